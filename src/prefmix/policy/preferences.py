"""What a mixture prefers: scores of comparisons and an order of candidates.

Legend: B comparisons, C candidates, K experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable, TextTable
from prefmix.experts.interface import ExpertLogProbs
from prefmix.mixture.bradley_terry import mixture_log_lik
from prefmix.mixture.likelihoods.feedback import (
    FeedbackRows,
    Sides,
    feedback_log_lik,
    marginal_log_lik,
    normalised,
    pair_outcomes,
    sides_of,
    text_rewards,
)
from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.mixture.likelihoods.own import is_proper
from prefmix.policy.config import PolicyConfig
from prefmix.policy.feedback_rows import check_feedback, table_rows


class PreferenceScores(NamedTuple):
    """B comparisons under every expert.

    Attributes:
        rewards_chosen: [B, K] r_k(x, y_w), nats; beta_k (log pi_k - log pi_ref(k)) but for losses with another reward.
        rewards_rejected: [B, K] r_k(x, y_l).
        margins: [B, K] m_k = r_k(x, y_w) - r_k(x, y_l).
        log_lik: [B, K] what the row says for each expert: log p_k(y_w > y_l), label noise included, nats; of ties,
            rankings and pseudo-likelihoods the training loss's.
        log_prob: [B, K] log-probability of the row; `log_lik` where that is one.
        sides: log-probabilities of both responses.
    """

    rewards_chosen: Float[Tensor, "B K"]
    rewards_rejected: Float[Tensor, "B K"]
    margins: Float[Tensor, "B K"]
    log_lik: Float[Tensor, "B K"]
    log_prob: Float[Tensor, "B K"]
    sides: Sides


class Ranked(NamedTuple):
    """A candidate and its place.

    Attributes:
        candidate: the candidate as it was given.
        score: mean over the other candidates j of sum_k w_k p_k(candidate > j) (or of the policy's one reward: see
            `candidate_scores`), a probability; 0.5 without others.
        position: where it stood in the list that was given.
    """

    candidate: Any
    score: float
    position: int


def preference_scores(
    log_probs: ExpertLogProbs, table: ComparisonTable, config: PolicyConfig, noise: Float[Tensor, "B"] | None = None
) -> PreferenceScores:
    """Rewards, margins and likelihoods of comparisons between texts.

    Args:
        log_probs: of the table's texts.
        table: B comparisons.
        config: beta and the observation model.
        noise: [B] learnt rates of whoever judged; None: the model's.

    Raises:
        ValueError: rows that the observation model has no likelihood for.
    """
    rows, model = table_rows(table, noise=noise), config.feedback_model
    beta = torch.tensor(config.beta, dtype=torch.float64)
    check_feedback(table, model)
    texts = (log_probs.log_probs.double(), log_probs.ref_log_probs.double())
    lik = feedback_log_lik(*texts, rows, beta, model)
    probability = lik.log_lik
    if not is_proper(model.loss_type):
        probability = normalised(pair_outcomes(lik.margins, beta, model)).win
    rewards = lik.rewards[rows.chosen], lik.rewards[rows.rejected]
    return PreferenceScores(*rewards, lik.margins, lik.log_lik, probability, sides_of(*texts, rows))


def candidate_scores(
    log_probs: ExpertLogProbs,
    candidates: TextTable,
    log_weights: Float[Tensor, "K"],
    config: PolicyConfig,
) -> Float[Tensor, "C"]:
    """How often a candidate wins against another one drawn at random, as this user would judge.

    Args:
        log_probs: of the C candidates.
        candidates: their texts.
        log_weights: [K] log w_k of the user.
        config: beta and the observation model: `beating_probability` under "mbt", else one scalar reward.
    """
    texts = (log_probs.log_probs.double(), log_probs.ref_log_probs.double())
    model, beta, num = config.feedback_model, torch.tensor(config.beta, dtype=torch.float64), len(candidates)
    if model.likelihood == "mbt":
        num_tokens = torch.tensor([len(ids) for ids in candidates.completion_ids])
        rewards = text_rewards(*texts, beta, num_tokens, model)
        return beating_probability(rewards, log_weights, beta, model)
    first = torch.arange(num).repeat_interleave(num)
    pairs = sides_of(*texts, FeedbackRows(first, torch.arange(num).repeat(num)))
    log_lik = marginal_log_lik(log_weights.double().expand(num * num, -1), pairs, beta, model)
    return _mean_over_others(log_lik.exp().view(num, num))


def beating_probability(
    rewards: Float[Tensor, "C K"], log_weights: Float[Tensor, "K"], beta: Float[Tensor, "K"], model: FeedbackModel
) -> Float[Tensor, "C"]:
    """How often a candidate wins against another one drawn at random, as this user would judge.

        s_i = 1 / (C - 1) sum_{j != i} sum_k w_k [p_k(i > j) + p_k(i = j) / 2]

    Each expert judges by one scalar reward, but the mixture's pairwise majority need not be transitive; this average (a
    Borda count in expectation) always orders. A single candidate scores 0.5.

    Args:
        rewards: [C, K] implicit rewards.
        log_weights: [K] log w_k of the user.
        beta: [K] beta_k.
        model: gives p_k; label noise and ties shrink scores towards 0.5 and change no order.
    """
    num = len(rewards)
    margins_BK = (rewards[:, None] - rewards[None]).flatten(0, 1)
    outcomes = normalised(pair_outcomes(margins_BK, beta.to(rewards.dtype), model))
    beats = torch.logaddexp(outcomes.win, outcomes.tie - math.log(2))
    wins = mixture_log_lik(log_weights.to(rewards.dtype).expand(num * num, -1), beats).exp().view(num, num)
    return _mean_over_others(wins)


def _mean_over_others(wins: Float[Tensor, "C C"]) -> Float[Tensor, "C"]:
    if len(wins) == 1:
        return torch.full((1,), 0.5, dtype=wins.dtype)
    return (wins.sum(dim=1) - wins.diagonal()) / (len(wins) - 1)


def score_dicts(
    scores: PreferenceScores,
    log_weights: Float[Tensor, "B K"],
    users: Sequence[str | None],
    source_rows: Sequence[int],
    config: PolicyConfig,
) -> dict[int, dict[str, Any]]:
    """JSON-ready scores by source row: what `MixturePolicy.score` documents."""
    model, beta = config.feedback_model, torch.tensor(config.beta, dtype=torch.float64)
    if model.likelihood == "mbt":
        probability = mixture_log_lik(log_weights, scores.log_prob).exp()
    else:
        probability = marginal_log_lik(log_weights.double(), scores.sides, beta, model).exp()
    return {
        row: {
            "row": row,
            "user": users[i],
            "weights": log_weights[i].exp().tolist(),
            "rewards/chosen": scores.rewards_chosen[i].tolist(),
            "rewards/rejected": scores.rewards_rejected[i].tolist(),
            "rewards/margins": scores.margins[i].tolist(),
            "probabilities": scores.log_prob[i].exp().tolist(),
            "probability": float(probability[i]),
        }
        for i, row in enumerate(source_rows)
    }
