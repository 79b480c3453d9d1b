"""Dr. DPO: the distributionally robust sum of rows' losses. Legend: B comparisons."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.precision import at_least_float32


def distributionally_robust_sum(
    log_lik: Float[Tensor, "B"], weight: Float[Tensor, "B"], robustness: float
) -> Float[Tensor, "B"]:
    """Rows whose sum is the robust aggregate: rows that fit badly, and may be wrong, count less.

        S = A b log[ sum_i a_i exp(l_i / b) / A ],   A = sum_i a_i,   dS/dl_i = A a_i e^(l_i/b) / sum_j a_j e^(l_j/b)

    As b grows S becomes sum_i a_i l_i, and the best rows alone count as b goes to 0. S is at least the plain sum.

    Args:
        log_lik: [B] log-likelihood (or bound) of each row, nats, not multiplied by its weight.
        weight: [B] a_i >= 0.
        robustness: b > 0 (the paper's beta'), nats.

    Returns:
        [B] shares of S, a_i S / A each; so their sum is S. 0 where all rows weigh nothing.

    Raises:
        ValueError: robustness is not positive.

    Source: Wu et al. 2024 (Dr. DPO, arXiv 2407.07880), equation 12, over the rows of one batch as there.
    """
    if not robustness > 0:
        raise ValueError(f"robustness is {robustness}, but it must be positive; 1 is the paper's choice")
    log_lik = at_least_float32(log_lik)
    weight = weight.to(log_lik.dtype)
    total = weight.sum()
    if not bool(total > 0):
        return 0.0 * log_lik
    value = robustness * (torch.logsumexp(log_lik / robustness + weight.log(), dim=0) - total.log())
    return weight * value
