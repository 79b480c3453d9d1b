"""Implicit rewards, margins and the Bradley-Terry likelihood of K experts.

Legend: N texts, B comparisons, K experts.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.mixture.posterior import posterior
from prefmix.mixture.precision import at_least_float32


def implicit_rewards(
    log_probs: Float[Tensor, "N K"], ref_log_probs: Float[Tensor, "N K"], beta: Float[Tensor, "K"]
) -> Float[Tensor, "N K"]:
    """The reward that makes expert k the optimal policy against its reference.

        r_k(x, y) = beta_k [log pi_k(y | x) - log pi_ref(k)(y | x)]

    Args:
        log_probs: [N, K] log pi_k(y | x), nats, summed over completion tokens.
        ref_log_probs: [N, K] the same of expert k's reference.
        beta: [K] positive; nats of reward for a nat of log-ratio.

    Returns:
        [N, K] implicit rewards, up to a function of the prompt alone.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 6; per expert, arXiv 2510.08256.
    """
    return beta * (at_least_float32(log_probs) - at_least_float32(ref_log_probs))


def margins(
    rewards: Float[Tensor, "N K"], chosen: Int[Tensor, "B"], rejected: Int[Tensor, "B"]
) -> Float[Tensor, "B K"]:
    """m_ik = r_k(x_i, y_chosen) - r_k(x_i, y_rejected).

    Args:
        rewards: [N, K] rewards of the distinct texts.
        chosen: [B] index of the preferred text.
        rejected: [B] index of the other text.
    """
    return rewards[chosen] - rewards[rejected]


def preference_log_lik(margins: Float[Tensor, "B K"], label_noise: float = 0.0) -> Float[Tensor, "B K"]:
    """Log-probability of the observed preference under every expert.

        log p_k = log[(1 - e) sigmoid(m_k) + e sigmoid(-m_k)],   d/dm_k = (1 - 2e) s(m_k) s(-m_k) / p_k

    Args:
        margins: [B, K] m_ik.
        label_noise: e, the share of labels that were flipped, 0 <= e < 0.5. With 0 this is logsigmoid(m).

    Returns:
        [B, K] nats; finite and with finite gradients at margins of +-1e4.

    Raises:
        ValueError: label_noise is not in [0, 0.5).

    Source: Bradley & Terry 1952; the noise term as in conservative DPO, but inside the logarithm.
    """
    if not 0.0 <= label_noise < 0.5:
        raise ValueError(
            f"label_noise is {label_noise}, but it must be at least 0 and below 0.5: with half of the labels flipped "
            "nothing can be learned. Give the share of labels that you believe to be wrong, for example 0.05."
        )
    margins = at_least_float32(margins)
    if label_noise == 0.0:
        return logsigmoid(margins)
    return torch.logaddexp(math.log1p(-label_noise) + logsigmoid(margins), math.log(label_noise) + logsigmoid(-margins))


def margins_of_log_lik(log_lik: Float[Tensor, "B K"], label_noise: float = 0.0) -> Float[Tensor, "B K"]:
    """The margins behind log-likelihoods: the inverse of `preference_log_lik`.

        m_k = log(p_k - e) - log(1 - e - p_k)

    So what is kept of a row as log p_k serves likelihoods of summed margins as well. Without noise nothing is lost but
    margins above 87 nats, where a float32 log p_k is 0. With noise p_k itself runs out of digits where it comes near e
    and 1 - e: margins beyond +-16 (float32; +-36 in float64) come back as about that.

    Args:
        log_lik: [B, K] log p_k of `preference_log_lik`, nats.
        label_noise: e, as there.

    Returns:
        [B, K] m_k, finite, of `log_lik`'s type.
    """
    smallest, digits = torch.finfo(log_lik.dtype).tiny, torch.finfo(log_lik.dtype).eps
    value = log_lik.double().clamp(max=-smallest)
    if label_noise == 0.0:
        return (value - torch.log(-torch.expm1(value))).to(log_lik.dtype)
    probability = value.exp()
    above, below = probability - label_noise, 1.0 - label_noise - probability
    return (above.clamp(min=digits).log() - below.clamp(min=digits).log()).to(log_lik.dtype)


def mixture_log_lik(log_weights: Float[Tensor, "B K"], log_lik: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """The mixture of Bradley-Terry likelihoods: log p(y_w > y_l | x, u) = log sum_k w_k p_k.

    Args:
        log_weights: [B, K] normalised log w_k (a gate for the population, a posterior for a known user).
        log_lik: [B, K] log p_k.

    Returns:
        [B] nats.

    Relations: the evidence of groups of one row. Bradley-Terry under the mixture reward log sum_k w_k exp(r_k) is
    another likelihood and is not computed here.
    """
    return posterior(log_weights, log_lik).log_evidence
