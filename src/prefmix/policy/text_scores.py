"""Log-probabilities of many texts under all experts, in batches of similar length. Legend: N texts, K experts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from prefmix.data.comparisons import TextTable
from prefmix.experts.interface import AbstractExperts, ExpertLogProbs, PaddedTexts
from prefmix.experts.text_pass import pad_texts


@torch.no_grad()
def text_log_probs(experts: AbstractExperts, texts: TextTable, *, tokens_per_batch: int = 4096) -> ExpertLogProbs:
    """Log pi_k(y | x) and log pi_ref(k)(y | x) of every text of a table, float32 on the CPU.

    Args:
        experts: K experts.
        texts: N distinct texts, each read once.
        tokens_per_batch: padded tokens that go through the trunk at once.
    """
    device = next(experts.parameters()).device
    log_probs = torch.empty(len(texts), experts.num_experts)
    ref_log_probs = torch.empty_like(log_probs)
    for rows in length_batches(texts, tokens_per_batch):
        padded = PaddedTexts(*(tensor.to(device) for tensor in pad_texts(texts, rows)))
        output = experts(padded)
        log_probs[rows] = output.log_probs.float().cpu()
        ref_log_probs[rows] = output.ref_log_probs.float().cpu()
    return ExpertLogProbs(log_probs, ref_log_probs)


def length_batches(texts: TextTable, tokens_per_batch: int) -> Iterator[np.ndarray]:
    """Rows of all texts, shortest first, so that little padding is read; a batch holds at least one text."""
    lengths = np.array([len(p) + len(c) for p, c in zip(texts.prompt_ids, texts.completion_ids)], dtype=np.int64)
    batch: list[int] = []
    for row in np.argsort(lengths, kind="stable"):
        # Lengths rise: the newest text is the longest and sets the padded length.
        if batch and (len(batch) + 1) * lengths[row] > tokens_per_batch:
            yield np.array(batch)
            batch = []
        batch.append(int(row))
    if batch:
        yield np.array(batch)
