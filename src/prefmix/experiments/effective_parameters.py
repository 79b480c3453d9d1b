"""How many parameters a mixture of linear rewards really has: a ridge leaves fewer than it is written with.

Legend: B comparisons, G groups (users), K experts, P features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.linear_em import ProbeData


def effective_parameters(
    data: ProbeData, resp: Float[Tensor, "G K"], coefficients: Float[Tensor, "K P"], ridge: float
) -> float:
    """K - 1 + sum_k tr[H_k (H_k + ridge I)^-1]: free parameters of a mixture of linear rewards under its ridge.

    Args:
        data: the comparisons.
        resp: [G, K] q.
        coefficients: [K, P] c_k.
        ridge: precision of their prior.

    Source: Hastie, Tibshirani & Friedman 2009, section 7.6, for logistic regression.
    """
    total = float(len(coefficients) - 1)
    for k, taste in enumerate(coefficients):
        right = torch.sigmoid(data.difference @ taste)
        curvature = resp[data.group, k] * data.weight * right * (1.0 - right)
        values = torch.linalg.eigvalsh((data.difference.T @ (data.difference * curvature.unsqueeze(1))).double())
        total += float((values.clamp(min=0) / (values.clamp(min=0) + ridge)).sum())
    return total
