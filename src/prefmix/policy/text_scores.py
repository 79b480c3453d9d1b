"""Log-probabilities of many texts: under all experts, in batches of similar length, or under their product.

Legend: N texts, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.comparisons import TextTable
from prefmix.data.stages import stage
from prefmix.experts.interface import AbstractExperts, ExpertLogProbs, PaddedTexts
from prefmix.experts.text_pass import pad_texts
from prefmix.policy.generation import blend


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
    with stage("scoring texts", len(texts), "text") as done:
        for rows in length_batches(texts, tokens_per_batch):
            padded = PaddedTexts(*(tensor.to(device) for tensor in pad_texts(texts, rows)))
            output = experts(padded)
            log_probs[rows] = output.log_probs.float().cpu()
            ref_log_probs[rows] = output.ref_log_probs.float().cpu()
            done(len(rows))
    return ExpertLogProbs(log_probs, ref_log_probs)


@torch.no_grad()
def product_log_probs(
    experts: AbstractExperts, texts: TextTable, log_weights: Float[Tensor, "N K"]
) -> Float[Tensor, "N"]:
    """Log p(y | x) of what decoder `product` writes: sum_t log of each token's normalised geometric mean; float64, CPU.

    It reads whole distributions, not the tokens' own probabilities alone: as slow as writing the texts one by one.

    Args:
        experts: K experts.
        texts: N texts.
        log_weights: [N, K] normalised log w of each.
    """
    device, total = next(experts.parameters()).device, torch.zeros(len(texts), dtype=torch.float64)
    for i, (prompt, completion) in enumerate(zip(texts.prompt_ids, texts.completion_ids)):
        input_ids = torch.tensor([list(prompt)], device=device)
        decoder = experts.decoder(input_ids, torch.ones_like(input_ids))
        for position, token in enumerate(completion):
            if position:
                decoder.append(torch.tensor([completion[position - 1]], device=device))
            log_probs = torch.log_softmax(blend(log_weights[i : i + 1].to(device), decoder.logits()), dim=-1)
            total[i] += float(log_probs[0, 0, token])
    return total


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
