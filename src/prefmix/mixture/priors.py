"""The Dirichlet prior of mixture weights: log density and the maximum a posteriori weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.precision import at_least_float32


def check_alpha(alpha: float) -> None:
    """Raises ValueError unless alpha >= 1, where the mode exists and EM raises evidence + log prior."""
    if not alpha >= 1.0:
        raise ValueError(
            f"alpha is {alpha}, but a Dirichlet concentration below 1 has its mode at weights of zero. "
            "Use 1 for a flat prior, or more (1.1 to 2) to keep small experts alive."
        )


def dirichlet_log_density(
    log_weights: Float[Tensor, "... K"], concentration: Float[Tensor, "K"]
) -> Float[Tensor, "..."]:
    """Log density of mixture weights.

        log Dirichlet(w | a) = log Gamma(sum_k a_k) - sum_k log Gamma(a_k) + sum_k (a_k - 1) log w_k

    The density is with respect to the weights (not their logits), so its mode is where EM's closed form goes.

    Args:
        log_weights: [..., K] normalised log w; -inf is allowed where a_k = 1.
        concentration: [K] a_k > 0.

    Returns:
        [...] nats; differentiable in both.
    """
    log_weights = at_least_float32(log_weights)
    exponent = concentration.to(log_weights.dtype) - 1.0
    normaliser = torch.lgamma(concentration.sum()) - torch.lgamma(concentration).sum()
    # A flat component contributes nothing even at w = 0; 0 * -inf would be NaN.
    flat = (exponent == 0).expand_as(log_weights) & torch.isinf(log_weights)
    return normaliser.to(log_weights.dtype) + (exponent * log_weights.masked_fill(flat, 0.0)).sum(dim=-1)


def map_log_weights(counts: Float[Tensor, "... K"], concentration: Float[Tensor, "K"]) -> Float[Tensor, "... K"]:
    """Maximum a posteriori weights: w_k = (n_k + a_k - 1) / sum_j (n_j + a_j - 1).

    Args:
        counts: [..., K] n_k >= 0, expected number of groups (or comparisons) of each expert.
        concentration: [K] a_k >= 1.

    Returns:
        [..., K] log w_k; -inf where n_k = 0 and a_k = 1; uniform where nothing is known at all.
    """
    pseudo = at_least_float32(counts) + (concentration - 1.0).to(counts.dtype)
    total = pseudo.sum(dim=-1, keepdim=True)
    pseudo = torch.where(total > 0, pseudo, torch.ones_like(pseudo))
    return pseudo.log() - pseudo.sum(dim=-1, keepdim=True).log()
