"""The IPO loss as a pseudo-log-likelihood. Legend: B comparisons, K experts."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.precision import at_least_float32


def ipo_log_lik(margins: Float[Tensor, "B K"], beta: Float[Tensor, "K"]) -> Float[Tensor, "B K"]:
    """A squared distance from the margin 1/2, not "the more the better".

        log p_k = - (m_k / beta_k - 1 / (2 beta_k))^2

    In the paper's terms h = m / beta is the difference of log-ratios and beta is tau. Up to constants this is a normal
    log density of the observed margin, so exp of it does not sum to 1 over the two outcomes.

    Args:
        margins: [B, K] m_k = beta_k h_k, with log-ratios averaged over completion tokens (as TRL and the authors do).
        beta: [K] positive.

    Source: Azar et al. 2023 (arXiv 2310.12036), equation 17; TRL's `loss_type="ipo"`.
    """
    return -(((at_least_float32(margins) - 0.5) / beta).square())
