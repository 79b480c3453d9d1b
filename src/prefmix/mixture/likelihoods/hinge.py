"""The hinge loss as a pseudo-log-likelihood. Legend: B comparisons, K experts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.precision import at_least_float32


def hinge_log_lik(margins: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Nothing more to gain beyond a margin of 1: log p_k = - max(0, 1 - m_k).

    No likelihood: exp of it does not sum to 1 over the two outcomes. Posteriors built on it are generalised ones.

    Args:
        margins: [B, K] m_k = beta_k (log-ratio of chosen - log-ratio of rejected).

    Source: Zhao et al. 2023 (SLiC, arXiv 2305.10425), as TRL's `loss_type="hinge"`.
    """
    return -torch.relu(1.0 - at_least_float32(margins))
