"""Likelihoods of one scalar reward of all experts together, as alternatives to the mixture of likelihoods.

Legend: B comparisons, K experts; w, l the preferred and the other response.

    mbt     p = sum_k w_k sigmoid(m_k)                                    (the default: `mixture_log_lik`)
    bt_lse  p = sigmoid(R_w - R_l),  R = log sum_k w_k exp r_k
    policy  p = sigmoid(beta [log sum_k w_k pi_k(y_w) / sum_k w_k pi_ref(k)(y_w) - (the same of y_l)])
    log_linear  p = sigmoid(sum_k w_k m_k)                                (a product of experts: `membership` only)

They differ: with w = (1/2, 1/2), r_w = (3, 0) and r_l = (0, 1) the first is 0.611, the second 0.850. `log_linear` gives
0.731. The last three are transitive. In `bt_lse` and `policy` the weights of the experts depend on the rewards, so EM's
closed forms do not hold: what is maximised is the marginal.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.precision import at_least_float32


def bt_lse_logit(
    log_weights: Float[Tensor, "B K"], chosen_rewards: Float[Tensor, "B K"], rejected_rewards: Float[Tensor, "B K"]
) -> Float[Tensor, "B"]:
    """Margin under the mixture reward: log sum_k w_k exp r_k(y_w) - log sum_k w_k exp r_k(y_l), nats.

    sigmoid of it equals sum_k v_k sigmoid(m_k) with v_k proportional to w_k (exp r_k(y_w) + exp r_k(y_l)).

    Args:
        log_weights: [B, K] normalised log w.
        chosen_rewards: [B, K] r_k(y_w), nats.
        rejected_rewards: [B, K] r_k(y_l), nats.

    Source: arXiv 2510.08256, the mixture reward; method section 1.
    """
    chosen, rejected = at_least_float32(chosen_rewards), at_least_float32(rejected_rewards)
    return torch.logsumexp(log_weights + chosen, dim=-1) - torch.logsumexp(log_weights + rejected, dim=-1)


def log_linear_logit(log_weights: Float[Tensor, "B K"], margins: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """Margin under the blended reward sum_k w_k r_k, nats: that of the product of experts.

    With one beta and sum_k w_k = 1,  sum_k w_k r_k = beta log prod_k (pi_k / pi_ref(k))^w_k,  so it is DPO's margin of
    the policy that is proportional to prod_k pi_k^w_k over whole responses.

    Args:
        log_weights: [B, K] normalised log w; -inf allowed.
        margins: [B, K] m_k, nats.
    """
    return (log_weights.exp() * at_least_float32(margins)).sum(dim=-1)


def policy_logit(
    log_weights: Float[Tensor, "B K"],
    chosen: tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]],
    rejected: tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]],
    beta: float | Float[Tensor, ""],
) -> Float[Tensor, "B"]:
    """DPO's margin for the mixture policy sum_k w_k pi_k against the mixture of references, nats.

    Args:
        log_weights: [B, K] normalised log w.
        chosen: log pi_k(y_w) and log pi_ref(k)(y_w), [B, K] each, nats.
        rejected: the same of y_l.
        beta: one number: there is one policy.

    Source: Rafailov et al. 2023, equation 7, with the mixture in the place of the policy.
    """

    def log_ratio(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
        policy = torch.logsumexp(log_weights + at_least_float32(log_probs), dim=-1)
        return policy - torch.logsumexp(log_weights + at_least_float32(ref_log_probs), dim=-1)

    return beta * (log_ratio(*chosen) - log_ratio(*rejected))
