"""One reading of many texts by a frozen trunk, in batches.

Legend: N texts, P prompts, n texts of a batch, L its longest text, T its completion tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prefmix.data.comparisons import TextTable
from prefmix.data.stages import stage
from prefmix.data.text_table import common_prefix_length
from prefmix.experts.interface import PackedStates, PaddedTexts
from prefmix.experts.reading import padded_states
from prefmix.experts.text_reader import TextReader
from prefmix.experts.trunk import pack_completions, trunk_states

# A CPU is as fast per token with 256 tokens as with 2,048 (measured), and small batches pad less.
_TOKENS_PER_BATCH = {"cpu": 1024}


class TextBatch(NamedTuple):
    """What the trunk says of some texts, on the CPU.

    Attributes:
        text_ids: [n] which texts.
        packed: states before their completion tokens; segments count within the batch.
        completion_mean: [n, D] float32 mean of the states *at* the completion tokens.
        prompt_mean: [n, D] float32 mean of the states at the prompt tokens; zeros for an empty prompt.
    """

    text_ids: np.ndarray
    packed: PackedStates
    completion_mean: Float[Tensor, "n D"]
    prompt_mean: Float[Tensor, "n D"]


def predicted_lengths(texts: TextTable) -> Int[np.ndarray, "N"]:
    """Completion tokens that have a token before them: all, or all but the first where the prompt is empty (as in TRL).

    Raises:
        ValueError: a text has none.
    """
    lengths = np.array(
        [
            len(completion) - (not len(prompt))
            for prompt, completion in zip(texts.prompt_ids, texts.completion_ids, strict=True)
        ],
        dtype=np.int64,
    )
    if len(lengths) and lengths.min() < 1:
        raise ValueError(f"text {int(lengths.argmin())}: no completion token can be scored; drop the row")
    return lengths


def read_texts(
    model: PreTrainedModel,
    texts: TextTable,
    text_ids: Int[np.ndarray, "M"],
    *,
    tokens_per_batch: int | None,
    progress: bool,
) -> Iterator[TextBatch]:
    """Runs the trunk over some texts once, what many of them begin with once for all (`reading`).

    Args:
        model: a frozen causal language model, on any device.
        texts: N texts.
        text_ids: [M] which of them to read, each once.
        tokens_per_batch: tokens in a batch, at least one text; by default what suits the device.
        progress: whether a bar counts tokens on stderr (where stages are shown, it does so anyhow).
    """
    if not len(text_ids):
        return  # a new reader tries its layouts on the model, which costs two passes
    lengths = np.array([len(p) + len(c) for p, c in zip(texts.prompt_ids, texts.completion_ids, strict=True)])
    device = model.get_output_embeddings().weight.device
    tokens_per_batch = tokens_per_batch or _TOKENS_PER_BATCH.get(device.type, 16384)
    reader = TextReader(model)
    batches = _neighbours(texts, text_ids, tokens_per_batch) if reader.shares else None
    with stage("reading texts", int(lengths[text_ids].sum()), "token", progress=progress) as done:
        for batch in batches or _batches(lengths, text_ids, tokens_per_batch):
            yield _read_batch(model, reader, texts, batch, device)
            done(int(lengths[batch].sum()))


def read_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "P D"]:
    """Mean state of each prompt, float32; for prompts that no text has."""
    device = model.get_output_embeddings().weight.device
    means = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
        states = trunk_states(model, ids, torch.ones_like(ids))[0]
        means.append(states.float().mean(0).cpu())
    return torch.stack(means)


def _batches(
    lengths: Int[np.ndarray, "N"], text_ids: Int[np.ndarray, "M"], tokens_per_batch: int
) -> Iterator[np.ndarray]:
    """Batches of like length, longest first (so that memory problems show at once)."""
    order = text_ids[np.argsort(-lengths[text_ids], kind="stable")]
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _neighbours(texts: TextTable, text_ids: Int[np.ndarray, "M"], tokens_per_batch: int) -> Iterator[np.ndarray]:
    """Batches of texts that begin alike; a token counts once for neighbours that share it."""
    batch: list[int] = []
    last: list[int] = []
    tokens = 0
    for text in sorted(text_ids.tolist(), key=lambda text: (texts.prompt_ids[text], texts.completion_ids[text])):
        row = [*texts.prompt_ids[text], *texts.completion_ids[text]]
        new = len(row) - common_prefix_length(last, row)
        if batch and tokens + new > tokens_per_batch:
            yield np.array(batch, dtype=np.int64)
            batch, tokens, new = [], 0, len(row)
        batch.append(text)
        tokens, last = tokens + new, row
    if batch:
        yield np.array(batch, dtype=np.int64)


def _read_batch(
    model: PreTrainedModel, reader: TextReader, texts: TextTable, text_ids: np.ndarray, device: torch.device
) -> TextBatch:
    padded = PaddedTexts(*(field.to(device) for field in pad_texts(texts, text_ids)))
    states = padded_states(model, reader.read(padded))
    packed = pack_completions(states, padded)
    return TextBatch(
        text_ids=text_ids,
        packed=PackedStates(packed.hidden.cpu(), packed.targets.cpu(), packed.segments.cpu(), packed.num_texts),
        completion_mean=_masked_mean(states, padded.completion_mask).cpu(),
        prompt_mean=_masked_mean(states, padded.attention_mask - padded.completion_mask).cpu(),
    )


def pad_texts(texts: TextTable, text_ids: np.ndarray) -> PaddedTexts:
    """Token ids of some texts, padded on the right with token 0 (masked, so any token would do)."""
    rows = [(texts.prompt_ids[i], texts.completion_ids[i]) for i in text_ids]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        input_ids[row, :length] = torch.tensor([*prompt, *completion], dtype=torch.int64)
        attention_mask[row, :length] = 1
        completion_mask[row, len(prompt) : length] = 1
    return PaddedTexts(input_ids, attention_mask, completion_mask)


def _masked_mean(states: Float[Tensor, "n L D"], mask: Int[Tensor, "n L"]) -> Float[Tensor, "n D"]:
    weight = mask.float()
    total = torch.einsum("nld,nl->nd", states.float(), weight)
    return total / weight.sum(1, keepdim=True).clamp(min=1)
