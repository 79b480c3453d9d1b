"""What a mixture prefers: scores of comparisons and an order of candidates.

Legend: B comparisons, C candidates, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.experts.interface import ExpertLogProbs
from prefmix.mixture.bradley_terry import implicit_rewards, margins, mixture_log_lik, preference_log_lik


class PreferenceScores(NamedTuple):
    """B comparisons under every expert.

    Attributes:
        rewards_chosen: [B, K] r_k(x, y_w) = beta_k (log pi_k - log pi_ref(k)), nats.
        rewards_rejected: [B, K] r_k(x, y_l).
        margins: [B, K] m_k = r_k(x, y_w) - r_k(x, y_l).
        log_lik: [B, K] log p_k(y_w > y_l), label noise included, nats.
    """

    rewards_chosen: Float[Tensor, "B K"]
    rewards_rejected: Float[Tensor, "B K"]
    margins: Float[Tensor, "B K"]
    log_lik: Float[Tensor, "B K"]


class Ranked(NamedTuple):
    """A candidate and its place.

    Attributes:
        candidate: the candidate as it was given.
        score: mean over the other candidates j of sum_k w_k p_k(candidate > j), a probability; 0.5 without others.
        position: where it stood in the list that was given.
    """

    candidate: Any
    score: float
    position: int


def preference_scores(
    log_probs: ExpertLogProbs,
    chosen: Int[Tensor, "B"],
    rejected: Int[Tensor, "B"],
    beta: Float[Tensor, "K"],
    label_noise: float,
) -> PreferenceScores:
    """Rewards, margins and likelihoods of comparisons between texts.

    Args:
        log_probs: of N texts.
        chosen: [B] index of the preferred text.
        rejected: [B] index of the other.
        beta: [K] beta_k.
        label_noise: e.
    """
    rewards = implicit_rewards(log_probs.log_probs.double(), log_probs.ref_log_probs.double(), beta.double())
    margins_BK = margins(rewards, chosen, rejected)
    return PreferenceScores(rewards[chosen], rewards[rejected], margins_BK, preference_log_lik(margins_BK, label_noise))


def beating_probability(
    rewards: Float[Tensor, "C K"], log_weights: Float[Tensor, "K"], label_noise: float
) -> Float[Tensor, "C"]:
    """How often a candidate wins against another one drawn at random, as this user would judge.

        s_i = 1 / (C - 1) sum_{j != i} sum_k w_k p_k(i > j)

    Each expert judges by one scalar reward, but the mixture's pairwise majority need not be transitive; this average (a
    Borda count in expectation) always orders. A single candidate scores 0.5.

    Args:
        rewards: [C, K] implicit rewards.
        log_weights: [K] log w_k of the user.
        label_noise: e of p_k, which shrinks scores towards 0.5 and changes no order.
    """
    num = len(rewards)
    if num == 1:
        return torch.full((1,), 0.5, dtype=rewards.dtype)
    log_lik = preference_log_lik((rewards[:, None] - rewards[None]).flatten(0, 1), label_noise)
    wins = mixture_log_lik(log_weights.to(rewards.dtype).expand(num * num, -1), log_lik).exp().view(num, num)
    return (wins.sum(dim=1) - wins.diagonal()) / (num - 1)


def score_dicts(
    scores: PreferenceScores,
    log_weights: Float[Tensor, "B K"],
    users: Sequence[str | None],
    source_rows: Sequence[int],
) -> dict[int, dict[str, Any]]:
    """JSON-ready scores by source row: what `MixturePolicy.score` documents."""
    probability = mixture_log_lik(log_weights, scores.log_lik).exp()
    return {
        row: {
            "row": row,
            "user": users[i],
            "weights": log_weights[i].exp().tolist(),
            "rewards/chosen": scores.rewards_chosen[i].tolist(),
            "rewards/rejected": scores.rewards_rejected[i].tolist(),
            "rewards/margins": scores.margins[i].tolist(),
            "probabilities": scores.log_lik[i].exp().tolist(),
            "probability": float(probability[i]),
        }
        for i, row in enumerate(source_rows)
    }
