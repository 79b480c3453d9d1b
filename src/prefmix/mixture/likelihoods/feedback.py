"""Rows of any kind of feedback -> log-likelihoods [B, K]: the one place where kinds meet.

Training, held-out figures, users' evidence and a policy's scores all come from here.
Legend: N texts, B rows, K experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefmix.mixture.annotator_noise import noisy_log_lik
from prefmix.mixture.bradley_terry import implicit_rewards, preference_log_lik
from prefmix.mixture.likelihoods.hinge import hinge_log_lik
from prefmix.mixture.likelihoods.ipo import ipo_log_lik
from prefmix.mixture.likelihoods.mixed_logit import mixed_logit_log_lik
from prefmix.mixture.likelihoods.mixture_reward import bt_lse_logit, log_linear_logit, policy_logit
from prefmix.mixture.likelihoods.model import PER_TOKEN, FeedbackModel
from prefmix.mixture.likelihoods.own import OWN_LOSSES
from prefmix.mixture.likelihoods.plackett_luce import Rankings, plackett_luce
from prefmix.mixture.likelihoods.rewards import mean_token_rewards, reference_free_rewards
from prefmix.mixture.likelihoods.robust import robust_log_lik
from prefmix.mixture.likelihoods.soft_labels import soft_label_log_lik
from prefmix.mixture.likelihoods.ties import TIES, Outcomes


class FeedbackRows(NamedTuple):
    """What was said of N texts in B rows.

    Attributes:
        chosen: [B] the preferred text; the best of a ranking.
        rejected: [B] the other text; the last of a ranking.
        num_tokens: [N] completion tokens of each text; needed where rewards are per token.
        tie: [B] both were judged equal; None: no row.
        label: [B] probability that `chosen` is the better one; None: 1 everywhere.
        rankings: the texts of all rows in order; None: every row is a pair.
        noise: [B] e_i in [0, 0.5] of whoever judged, where rates are learnt; None: the model's `label_noise`.
    """

    chosen: Int[Tensor, "B"]
    rejected: Int[Tensor, "B"]
    num_tokens: Int[Tensor, "N"] | None = None
    tie: Bool[Tensor, "B"] | None = None
    label: Float[Tensor, "B"] | None = None
    rankings: Rankings | None = None
    noise: Float[Tensor, "B"] | None = None


class Sides(NamedTuple):
    """Log-probabilities of both responses of B rows, [B, K] each, nats; what a likelihood of the mixture reads."""

    chosen: Float[Tensor, "B K"]
    rejected: Float[Tensor, "B K"]
    ref_chosen: Float[Tensor, "B K"]
    ref_rejected: Float[Tensor, "B K"]


class FeedbackLogLik(NamedTuple):
    """What K experts say of B rows.

    Attributes:
        rewards: [N, K] of the texts, nats.
        margins: [B, K] reward of `chosen` less that of `rejected`.
        log_lik: [B, K] (pseudo-)log-likelihood of the row, nats.
    """

    rewards: Float[Tensor, "N K"]
    margins: Float[Tensor, "B K"]
    log_lik: Float[Tensor, "B K"]


def text_rewards(
    log_probs: Float[Tensor, "N K"],
    ref_log_probs: Float[Tensor, "N K"],
    beta: Float[Tensor, "K"],
    num_tokens: Int[Tensor, "N"] | None,
    model: FeedbackModel,
) -> Float[Tensor, "N K"]:
    """[N, K] the reward behind the loss, nats."""
    if model.loss_type not in PER_TOKEN:
        return implicit_rewards(log_probs, ref_log_probs, beta)
    assert num_tokens is not None, "rewards per token need the number of tokens"
    if model.loss_type == "simpo":
        return reference_free_rewards(log_probs, num_tokens, beta)
    return mean_token_rewards(log_probs, ref_log_probs, num_tokens, beta)


def _side_log_lik(
    margins: Float[Tensor, "B K"], beta: Float[Tensor, "K"], model: FeedbackModel, noise: Float[Tensor, "B"] | None
) -> Float[Tensor, "B K"]:
    """Of winning, at learnt rates of whoever judged where there are any."""
    if noise is None:
        return _pair_log_lik(margins, beta, model)
    assert model.loss_type in ("sigmoid", "sigmoid_norm"), "rates are learnt under these alone"
    return noisy_log_lik(margins, noise)


def pair_outcomes(
    margins: Float[Tensor, "B K"],
    beta: Float[Tensor, "K"],
    model: FeedbackModel,
    noise: Float[Tensor, "B"] | None = None,
) -> Outcomes:
    """The (pseudo-)log-likelihood of winning, tying and losing; ties at -inf where nothing models them.

    Args:
        margins: [B, K] m_ik.
        beta: [K].
        model: the observation model; label smoothing is not applied here.
        noise: [B] rates in the place of the model's.
    """
    if model.keeps_ties:
        return TIES[model.ties](margins, model.tie_strength)
    win, loss = (_side_log_lik(side, beta, model, noise) for side in (margins, -margins))
    return Outcomes(win, torch.full_like(win, -torch.inf), loss)


def _pair_log_lik(margins: Float[Tensor, "B K"], beta: Float[Tensor, "K"], model: FeedbackModel) -> Tensor:
    if model.loss_type in OWN_LOSSES:
        return OWN_LOSSES[model.loss_type].log_lik(margins, beta)
    if model.loss_type == "hinge":
        return hinge_log_lik(margins)
    if model.loss_type == "ipo":
        return ipo_log_lik(margins, beta)
    if model.loss_type == "robust":
        return robust_log_lik(margins, model.label_smoothing)
    if model.loss_type == "mixed_logit":
        return mixed_logit_log_lik(margins, model.beta_spread, model.label_noise)
    if model.loss_type not in ("sigmoid", "sigmoid_norm", "simpo"):
        raise ValueError(f"loss_type={model.loss_type!r} is not known here; call register_loss before it is needed")
    asked = model.simpo_gamma if model.loss_type == "simpo" else 0.0
    return preference_log_lik(margins - asked, model.label_noise)


def normalised(outcomes: Outcomes) -> Outcomes:
    """Outcomes as probabilities: exp of a pseudo-log-likelihood does not sum to 1; those of likelihoods stay."""
    total = torch.logsumexp(torch.stack(outcomes), dim=0)
    return Outcomes(*(log_lik - total for log_lik in outcomes))


def feedback_log_lik(
    log_probs: Float[Tensor, "N K"],
    ref_log_probs: Float[Tensor, "N K"],
    rows: FeedbackRows,
    beta: Float[Tensor, "K"],
    model: FeedbackModel,
) -> FeedbackLogLik:
    """Rewards, margins and log-likelihoods of rows.

    Args:
        log_probs: [N, K] log pi_k(y | x), nats, summed over completion tokens.
        ref_log_probs: [N, K] of expert k's reference.
        rows: B rows over these texts.
        beta: [K] beta_k.
        model: the observation model.
    """
    rewards = text_rewards(log_probs, ref_log_probs, beta, rows.num_tokens, model)
    margins = rewards[rows.chosen] - rewards[rows.rejected]
    return FeedbackLogLik(rewards, margins, _row_log_lik(rewards, margins, rows, beta, model))


def _row_log_lik(
    rewards: Float[Tensor, "N K"],
    margins: Float[Tensor, "B K"],
    rows: FeedbackRows,
    beta: Float[Tensor, "K"],
    model: FeedbackModel,
) -> Float[Tensor, "B K"]:
    smoothing = 0.0 if model.loss_type == "robust" else model.label_smoothing
    if rows.label is None and not smoothing and not model.keeps_ties:
        log_lik = _side_log_lik(margins, beta, model, rows.noise)
    else:
        outcomes = pair_outcomes(margins, beta, model, rows.noise)
        label = margins.new_ones(len(margins)) if rows.label is None else rows.label.to(margins.dtype)
        label = label * (1.0 - smoothing) + (1.0 - label) * smoothing
        log_lik = soft_label_log_lik(outcomes.win, outcomes.loss, label)
        if rows.tie is not None:
            log_lik = torch.where(rows.tie.unsqueeze(1), outcomes.tie, log_lik)
    if rows.rankings is not None:
        longer = (rows.rankings.size > 2).unsqueeze(1)
        log_lik = torch.where(longer, plackett_luce(rewards, rows.rankings).to(log_lik.dtype), log_lik)
    return log_lik


def sides_of(log_probs: Float[Tensor, "N K"], ref_log_probs: Float[Tensor, "N K"], rows: FeedbackRows) -> Sides:
    """The log-probabilities that `marginal_logit` reads."""
    return Sides(
        log_probs[rows.chosen], log_probs[rows.rejected], ref_log_probs[rows.chosen], ref_log_probs[rows.rejected]
    )


def marginal_logit(
    log_weights: Float[Tensor, "B K"], sides: Sides, beta: Float[Tensor, "K"], model: FeedbackModel
) -> Float[Tensor, "B"]:
    """The mixture's own margin under a `likelihood` other than "mbt", nats.

    Args:
        log_weights: [B, K] normalised log w.
        sides: of the rows.
        beta: [K]; equal under "policy".
        model: names the likelihood.
    """
    if model.likelihood == "policy":
        return policy_logit(
            log_weights, (sides.chosen, sides.ref_chosen), (sides.rejected, sides.ref_rejected), beta[0]
        )
    chosen = implicit_rewards(sides.chosen, sides.ref_chosen, beta)
    rejected = implicit_rewards(sides.rejected, sides.ref_rejected, beta)
    if model.is_product:
        return log_linear_logit(log_weights, chosen - rejected)
    return bt_lse_logit(log_weights, chosen, rejected)


def marginal_log_lik(
    log_weights: Float[Tensor, "B K"],
    sides: Sides,
    beta: Float[Tensor, "K"],
    model: FeedbackModel,
) -> Float[Tensor, "B"]:
    """Log p(y_w > y_l) of the mixture under a `likelihood` other than "mbt", label noise included; nats."""
    logit = marginal_logit(log_weights, sides, beta, model)
    return preference_log_lik(logit.unsqueeze(1), model.label_noise).squeeze(1)
