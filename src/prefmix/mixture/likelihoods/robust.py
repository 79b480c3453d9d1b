"""The unbiased loss under known label noise (robust DPO) as a pseudo-log-likelihood. Legend: B rows, K experts."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.mixture.precision import at_least_float32


def robust_log_lik(margins: Float[Tensor, "B K"], label_smoothing: float) -> Float[Tensor, "B K"]:
    """Its mean over flipped labels is the clean log-likelihood.

        log p_k = [(1 - e) logsigmoid(m_k) - e logsigmoid(-m_k)] / (1 - 2e)

    E[log p_k] over labels flipped with probability e is logsigmoid of the clean margin. It grows without bound in the
    margin (like e m / (1 - 2e)), so exp of it is no probability, and a surely separated expert keeps gaining.

    Args:
        margins: [B, K] m_k.
        label_smoothing: e, the share of flipped labels, 0 <= e < 0.5.

    Raises:
        ValueError: e is not in [0, 0.5).

    Source: Ray Chowdhury et al. 2024 (arXiv 2403.00409), equation 8; TRL's `loss_type="robust"`.

    Relations: `preference_log_lik` with label noise is the likelihood of the same noise.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, but it must be at least 0 and below 0.5: with half of the labels "
            "flipped nothing can be learned. Give the share of labels that you believe to be wrong, such as 0.1."
        )
    margins = at_least_float32(margins)
    kept, flipped = (1.0 - label_smoothing) * logsigmoid(margins), label_smoothing * logsigmoid(-margins)
    return (kept - flipped) / (1.0 - 2.0 * label_smoothing)
