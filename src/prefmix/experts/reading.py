"""How texts are laid out for a pass of the trunk, and where in its output the states of their completions stand.

Right-padded rows, one a text, work for every architecture. Where a model's attention allows, texts lie end to end in
one row instead, without padding, and a beginning that texts share (the prompt of chosen and rejected) is computed once.

Legend: N texts, L padded length, R rows, M their length, T completion tokens, D hidden, S spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prefmix.data.prefixes import SHORTEST_PREFIX, prefix_tree
from prefmix.experts.flat_attention import FlatSpan, flat_attention
from prefmix.experts.interface import PackedStates, PaddedTexts
from prefmix.experts.trunk import completion_places, run_trunk


class Kept(NamedTuple):
    """What is left of a reading when some of its texts are.

    Attributes:
        axis: 0 where whole rows are kept, 1 where tokens of the one row are.
        size: how many there were along it.
        places: those kept.
    """

    axis: int
    size: int
    places: Int[Tensor, "kept"]


class Reading(NamedTuple):
    """Texts laid out for the trunk.

    Attributes:
        input_ids: [R, M].
        attention_mask: [R, M] 1 on tokens.
        position_ids: [R, M] place of each token in its texts; None: what the mask says.
        places: [N, L] place (row times M plus column) of every token of the texts; anything in the padding.
        before: [T] place of the token before each completion token.
        targets: [T] the completion tokens.
        segments: [T] the text of each, non-decreasing.
        num_texts: N.
        spans: S pieces of the one row; None where every text has a row.
        readers: [S, N] which texts read which span; None likewise.
    """

    input_ids: Int[Tensor, "R M"]
    attention_mask: Int[Tensor, "R M"]
    position_ids: Int[Tensor, "R M"] | None
    places: Int[Tensor, "N L"]
    before: Int[Tensor, "T"]
    targets: Int[Tensor, "T"]
    segments: Int[Tensor, "T"]
    num_texts: int
    spans: tuple[FlatSpan, ...] | None = None
    readers: np.ndarray | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `trunk.run_trunk` is told beside tokens and mask."""
        options: dict[str, Any] = {"use_cache": False}
        return options if self.position_ids is None else options | {"position_ids": self.position_ids}

    def completions(self, hidden: Float[Tensor, "R M D"]) -> PackedStates:
        """The states before every completion token, texts one after another."""
        states = hidden.flatten(0, 1).index_select(0, self.before)
        return PackedStates(states, self.targets, self.segments, self.num_texts)

    def select(self, texts: Int[Tensor, "n"]) -> tuple[Reading, Kept]:
        """The reading of some of the texts (ascending), and what it keeps of this one."""
        segments = _numbers(texts, self.num_texts)[self.segments]
        scored = segments >= 0
        length = self.input_ids.shape[1]
        common = self._replace(targets=self.targets[scored], segments=segments[scored], num_texts=len(texts))
        if self.spans is None or self.readers is None or self.position_ids is None:
            part = common._replace(
                input_ids=self.input_ids[texts],
                attention_mask=self.attention_mask[texts],
                places=self.places[: len(texts)],
                before=common.segments * length + self.before[scored] % length,
            )
            return part, Kept(0, self.num_texts, texts)
        readers = self.readers[:, texts.cpu().numpy()]
        chosen: np.ndarray = np.any(readers, axis=1)
        kept = np.flatnonzero(chosen.repeat([span.length for span in self.spans]))
        tokens = torch.from_numpy(kept).to(texts.device)
        numbers = _numbers(tokens, length)
        part = common._replace(
            input_ids=self.input_ids[:, tokens],
            attention_mask=self.attention_mask[:, tokens],
            position_ids=self.position_ids[:, tokens],
            places=numbers[self.places[texts]],
            before=numbers[self.before[scored]],
            spans=_renumbered(self.spans, chosen),
            readers=readers[chosen],
        )
        return part, Kept(1, length, tokens)


def padded_reading(texts: PaddedTexts) -> Reading:
    """A right-padded row for each text."""
    text, position = completion_places(texts)
    places = torch.arange(texts.input_ids.numel(), device=text.device).view_as(texts.input_ids)
    scores = (places[text, position], texts.input_ids[text, position + 1], text, len(texts.input_ids))
    return Reading(texts.input_ids, texts.attention_mask, None, places, *scores)


def flat_reading(texts: PaddedTexts, shortest: int = SHORTEST_PREFIX) -> Reading:
    """All texts in one row: the spans of their prefix tree (`data.prefixes`), end to end."""
    ids, mask, scored = (field.cpu().numpy() for field in texts)
    tree = prefix_tree(ids, mask.sum(1), shortest)
    place, readers = np.zeros(ids.shape, dtype=np.int64), np.zeros((len(tree), len(ids)), dtype=bool)
    total = 0
    for number, span in enumerate(tree):
        place[span.texts, span.start : span.stop] = total + np.arange(span.stop - span.start)
        readers[number, span.texts] = True
        total += span.stop - span.start
    text, position = scored[:, 1:].nonzero()
    arrays = (
        np.concatenate([ids[span.texts[0], span.start : span.stop] for span in tree])[None],
        np.concatenate([np.arange(span.start, span.stop) for span in tree])[None],
        place,
        place[text, position],
        ids[text, position + 1],
        text,
    )
    row, positions, places, *scores = (torch.from_numpy(array).to(texts.input_ids.device) for array in arrays)
    spans = tuple(FlatSpan(span.stop - span.start, span.parents) for span in tree)
    before, targets, segments = scores
    rest = (places, before, targets, segments, len(ids), spans, readers)
    return Reading(row, torch.ones_like(row), positions, *rest)


def run_reading(model: PreTrainedModel, reading: Reading) -> PackedStates:
    """Final-norm states before every completion token, with a gradient to whatever trains in the model."""
    return reading.completions(_run(model, reading))


@torch.no_grad()
def padded_states(model: PreTrainedModel, reading: Reading) -> Float[Tensor, "N L D"]:
    """Final-norm states of every text in a row of its own, anything in the padding."""
    return _run(model, reading).flatten(0, 1)[reading.places]


def _run(model: PreTrainedModel, reading: Reading) -> Float[Tensor, "R M D"]:
    with flat_attention(model, reading.spans):
        output = run_trunk(model, reading.input_ids, reading.attention_mask, **reading.options)
    return output.last_hidden_state  # type: ignore[no-any-return]


def _renumbered(spans: Sequence[FlatSpan], chosen: Bool[np.ndarray, "S"]) -> tuple[FlatSpan, ...]:
    """Those chosen, all parents of one among them."""
    numbers = (np.cumsum(chosen) - 1).tolist()
    kept = [span for span, keep in zip(spans, chosen, strict=True) if keep]
    return tuple(FlatSpan(span.length, tuple(numbers[parent] for parent in span.parents)) for span in kept)


def _numbers(chosen: Int[Tensor, "n"], size: int) -> Int[Tensor, "size"]:
    """Where each of 0..size-1 stands in `chosen`, or -1."""
    numbers = torch.full((size,), -1, device=chosen.device)
    numbers[chosen] = torch.arange(len(chosen), device=chosen.device)
    return numbers
