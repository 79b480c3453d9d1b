"""beta-DPO: a beta that follows how large the gaps of a batch are. Legend: B comparisons, K experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class AdaptiveBeta(NamedTuple):
    """What one batch makes of the running threshold.

    Attributes:
        beta: [K] beta_k [1 + alpha (M_k - M0_k)], at least `floor` times beta_k.
        threshold: [K] the next M0_k = momentum M0_k + (1 - momentum) M_k.
    """

    beta: Float[Tensor, "K"]
    threshold: Float[Tensor, "K"]


def adapt_beta(
    margins: Float[Tensor, "B K"],
    row_weight: Float[Tensor, "B K"],
    beta: Float[Tensor, "K"],
    threshold: Float[Tensor, "K"],
    *,
    alpha: float = 0.6,
    momentum: float = 0.9,
    floor: float = 0.1,
) -> AdaptiveBeta:
    """A batch of large gaps (easy, or wrong) gets a large beta, which holds experts near the reference.

    M_k is the mean margin of expert k over the batch, at its own beta_k, rows weighted by who explains them; with one
    expert and equal weights this is the paper's batch-level beta.

    Args:
        margins: [B, K] m_ik at beta, nats; detached here.
        row_weight: [B, K] a_i q_ik >= 0.
        beta: [K] beta_k.
        threshold: [K] M0_k.
        alpha: how strongly beta follows (the paper: 0.6).
        momentum: of the threshold (the paper: 0.9).
        floor: smallest factor, so that beta stays positive.

    Source: Wu et al. 2024 (beta-DPO, arXiv 2407.08639), equations 7 to 9, without its filter of rows.
    """
    margins = margins.detach()
    total = row_weight.sum(dim=0)
    mean = (row_weight * margins).sum(dim=0) / torch.where(total > 0, total, 1.0)
    mean = torch.where(total > 0, mean, threshold)  # an expert without rows stays where it is
    factor = (1.0 + alpha * (mean - threshold)).clamp_min(floor)
    return AdaptiveBeta(beta * factor, momentum * threshold + (1.0 - momentum) * mean)
