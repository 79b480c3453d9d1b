"""Posterior over experts, evidence, and the divergence of responsibilities from the gate.

Everything is a pure function of log weights and log-likelihoods, shared by the E-steps, the gates and the metrics.
Legend: B rows, G groups, K experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.precision import at_least_float32


class Posterior(NamedTuple):
    """What the data of a group say about its expert.

    Attributes:
        log_resp: [G, K] log q_gk = log w_gk + log p_gk - log sum_j w_gj p_gj; rows of q sum to 1.
        log_evidence: [G] log sum_k w_gk p_gk, nats.
    """

    log_resp: Float[Tensor, "G K"]
    log_evidence: Float[Tensor, "G"]


def posterior(log_weights: Float[Tensor, "G K"], log_lik: Float[Tensor, "G K"]) -> Posterior:
    """Bayes' rule over experts, in log space.

    Args:
        log_weights: [G, K] normalised log w_gk; entries may be -inf, a whole row may not.
        log_lik: [G, K] log-likelihood of the group's data under expert k, nats, finite.

    Returns:
        Posterior, differentiable in both arguments.

    Source: method fact 1: d evidence / d log_lik = q, and in the gate's logits q - w.
    """
    log_lik = at_least_float32(log_lik)
    # The best expert goes to zero before the weights are added: at -1e4 nats float32 would round them away.
    peak = log_lik.detach().amax(dim=-1, keepdim=True)
    log_joint = (log_lik - peak) + at_least_float32(log_weights)
    log_evidence = torch.logsumexp(log_joint, dim=-1) + peak.squeeze(-1)
    return Posterior(torch.log_softmax(log_joint, dim=-1), log_evidence)


def group_log_lik(
    log_lik: Float[Tensor, "B K"],
    group: Int[Tensor, "B"],
    num_groups: int,
    weight: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "G K"]:
    """Evidence that the rows of a group give together: sum over i of g of a_i log p_ik.

    Args:
        log_lik: [B, K] nats.
        group: [B] in 0..G-1.
        num_groups: G; groups without rows get zeros.
        weight: [B] a_i, or None for ones. Under `latent="pair"` pass None: there a row's weight multiplies its whole
            bound, outside the logarithm (two equal rows are two draws), not the likelihood inside it.
    """
    log_lik = at_least_float32(log_lik)
    weighted = log_lik if weight is None else log_lik * weight.to(log_lik.dtype).unsqueeze(-1)
    return log_lik.new_zeros(num_groups, log_lik.shape[-1]).index_add(0, group, weighted)


def kl_to_gate(log_resp: Float[Tensor, "G K"], log_weights: Float[Tensor, "G K"]) -> Float[Tensor, "G"]:
    """KL(q_g || w_g) = sum_k q_gk (log q_gk - log w_gk), nats.

    Terms with q = 0 are zero, whatever the weight, in value and in gradient; q > 0 where w = 0 gives +inf.

    Args:
        log_resp: [G, K] log q; -inf allowed (hard posteriors).
        log_weights: [G, K] log w; -inf allowed. The gradient in the gate's logits is w - q.
    """
    log_resp, log_weights = at_least_float32(log_resp), at_least_float32(log_weights)
    resp = log_resp.exp()
    # Both logarithms are masked before the subtraction: 0 * -inf would be NaN, forward and backward.
    outside = resp == 0
    return (resp * (log_resp.masked_fill(outside, 0.0) - log_weights.masked_fill(outside, 0.0))).sum(dim=-1)
