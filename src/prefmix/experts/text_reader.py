"""Which layout a model reads texts in: one row with shared beginnings where that is right for it, else padded rows."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from prefmix.experts.flat_attention import longest_text, takes_spans
from prefmix.experts.interface import PaddedTexts
from prefmix.experts.reading import Reading, flat_reading, padded_reading, run_reading

# A tree of depth three, a text that is the beginning of another, and one that shares nothing.
_EXAMPLE = [[3, 4, 5, 6], [3, 4, 5, 7, 8, 9], [3, 4, 5, 7, 8, 9, 2], [3, 4, 5, 7, 8, 1], [9, 8, 7, 6, 5]]


class TextReader:
    """Lays texts out for one model.

    Attributes:
        shares: whether beginnings may be shared; false for architectures that a trial shows to differ.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Tries both layouts on a few tokens."""
        self._longest = longest_text(model)
        self.shares = _same_states(model, self._longest)

    def read(self, texts: PaddedTexts, prefix_sharing: bool = True) -> Reading:
        """One row for all, or a row each where texts are longer than the model's attention reaches back."""
        short = self._longest is None or texts.input_ids.shape[1] <= self._longest
        return flat_reading(texts) if prefix_sharing and self.shares and short else padded_reading(texts)


@torch.no_grad()
def _same_states(model: PreTrainedModel, longest: int | None) -> bool:
    """Whether texts have the same states in one row as in rows of their own."""
    texts = _example(model)
    if not takes_spans(model) or (longest is not None and longest < texts.input_ids.shape[1]):
        return False
    was_training = model.training
    model.eval()
    try:
        found = run_reading(model, flat_reading(texts, shortest=2)).hidden
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError):
        return False  # whatever it is that this architecture cannot do, padded rows it can
    finally:
        model.train(was_training)
    expected = run_reading(model, padded_reading(texts)).hidden
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    return bool(difference <= (1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2))


def _example(model: PreTrainedModel) -> PaddedTexts:
    weight = model.get_output_embeddings().weight
    rows = torch.zeros(len(_EXAMPLE), max(map(len, _EXAMPLE)), dtype=torch.int64)
    mask = torch.zeros_like(rows)
    for row, tokens in enumerate(_EXAMPLE):
        rows[row, : len(tokens)] = torch.tensor(tokens) % len(weight)
        mask[row, : len(tokens)] = 1
    return PaddedTexts(*(field.to(weight.device) for field in (rows, mask, mask)))
