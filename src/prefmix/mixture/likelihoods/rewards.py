"""The reward behind each loss: log-ratios against a reference, their mean over tokens, or log-probabilities alone.

Legend: N texts, K experts.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.bradley_terry import implicit_rewards
from prefmix.mixture.precision import at_least_float32


def mean_token_rewards(
    log_probs: Float[Tensor, "N K"],
    ref_log_probs: Float[Tensor, "N K"],
    num_tokens: Int[Tensor, "N"],
    beta: Float[Tensor, "K"],
) -> Float[Tensor, "N K"]:
    """r_k = beta_k / |y| [log pi_k(y | x) - log pi_ref(k)(y | x)]: a long text counts no more than a short one.

    Args:
        log_probs: [N, K] nats, summed over completion tokens.
        ref_log_probs: [N, K] of the reference.
        num_tokens: [N] |y|, completion tokens.
        beta: [K] positive.

    Source: TRL's `loss_type="sigmoid_norm"` and "ipo" (Azar et al. 2023, confirmed to TRL by the authors).
    """
    return implicit_rewards(log_probs, ref_log_probs, beta) / num_tokens.unsqueeze(-1)


def reference_free_rewards(
    log_probs: Float[Tensor, "N K"], num_tokens: Int[Tensor, "N"], beta: Float[Tensor, "K"]
) -> Float[Tensor, "N K"]:
    """r_k = beta_k / |y| log pi_k(y | x): SimPO's reward, no reference.

    Untrained experts prefer what the base model finds likely, so margins do not start at zero.

    Args:
        log_probs: [N, K] nats, summed over completion tokens.
        num_tokens: [N] |y|, completion tokens.
        beta: [K] positive; SimPO uses 2 to 10.

    Source: Meng et al. 2024 (arXiv 2405.14734), equation 4.
    """
    return beta * at_least_float32(log_probs) / num_tokens.unsqueeze(-1)
