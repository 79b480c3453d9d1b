"""Weights of a user who may use several experts: maximum a posteriori by EM, no training.

This is the `user` gate term (`latent="pair"`). Where a user has one expert (`latent="user"`) the posterior is Bayes'
rule and stands in `mixture.posterior`. Legend: B comparisons of U users, n of one user, K experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.posterior import posterior

MAX_STEPS = 10_000
TOLERANCE = 1e-9


def map_user_offsets(
    gate_log_weights: Float[Tensor, "n K"],
    log_lik: Float[Tensor, "n K"],
    weight: Float[Tensor, "n"],
    population: Float[Tensor, "K"],
    past_counts: Float[Tensor, "K"],
) -> Float[Tensor, "K"]:
    """The user's logit offsets b, given their comparisons.

        maximise  sum_i a_i log sum_k w_ik(b) p_ik  +  sum_k c_k log w_k(b)
        w_i(b) = softmax(gate_i + b),   w(b) = softmax(population + b)

    The second sum is the past: the Dirichlet prior's pseudo-comparisons, and the expected number of earlier comparisons
    of each expert (incremental EM: earlier comparisons keep the responsibilities that they had). Each EM step sets

        b_k += log[ (sum_i a_i q_ik + c_k) / (sum_i a_i w_ik(b) + w_k(b) sum_j c_j) ]

    which is generalised iterative scaling, never lowers the objective, and is the closed form w_k proportional to
    sum_i a_i q_ik + c_k where the gate is the same for every comparison.

    Args:
        gate_log_weights: [n, K] log w_i of the gate without the user's own offsets.
        log_lik: [n, K] log p_ik, nats.
        weight: [n] a_i > 0.
        population: [K] log weights of the gate's global term.
        past_counts: [K] c_k, not all zero.

    Returns:
        [K] offsets, float64, such that softmax(population + b) are the user's weights.

    Relations: `Gate.log_prior` has the same prior, 1 + c w_global.
    """
    user = torch.zeros(len(weight), dtype=torch.long)
    return map_offsets_of_users(gate_log_weights, log_lik, weight, user, population, past_counts.unsqueeze(0))[0]


def map_offsets_of_users(
    gate_log_weights: Float[Tensor, "B K"],
    log_lik: Float[Tensor, "B K"],
    weight: Float[Tensor, "B"],
    user: Int[Tensor, "B"],
    population: Float[Tensor, "K"],
    past_counts: Float[Tensor, "U K"],
) -> Float[Tensor, "U K"]:
    """`map_user_offsets` of many users at once.

    Args:
        gate_log_weights: [B, K] log w_i of the gate without users' own offsets.
        log_lik: [B, K] log p_ik, nats.
        weight: [B] a_i > 0.
        user: [B] whose comparison it is, 0..U-1.
        population: [K] log weights of the gate's global term.
        past_counts: [U, K] c_uk, not all zero for a user.

    Returns:
        [U, K] offsets, float64; those of a user without comparisons are what `past_counts` say.
    """
    gate_log_weights, log_lik, weight = gate_log_weights.double(), log_lik.double(), weight.double().unsqueeze(1)
    population, past_UK = population.double(), past_counts.double()

    def of_users(rows_BK: Float[Tensor, "B K"]) -> Float[Tensor, "U K"]:
        return torch.zeros_like(past_UK).index_add_(0, user, weight * rows_BK)

    log_user_weights = torch.log_softmax(past_UK.log(), dim=-1)
    offsets = log_user_weights - population
    for _ in range(MAX_STEPS):
        log_weights = torch.log_softmax(gate_log_weights + offsets[user], dim=-1)
        wanted = of_users(posterior(log_weights, log_lik).log_resp.exp()) + past_UK
        expected = of_users(log_weights.exp()) + past_UK.sum(1, keepdim=True) * log_user_weights.exp()
        offsets = torch.log_softmax(population + offsets + (wanted / expected).log(), dim=-1) - population
        previous, log_user_weights = log_user_weights, torch.log_softmax(population + offsets, dim=-1)
        if (log_user_weights.exp() - previous.exp()).abs().max() < TOLERANCE:
            break
    return offsets
