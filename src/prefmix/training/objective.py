"""The objective of one batch as pure functions: log-probabilities -> margins -> likelihoods, and the E-step by name.

Nothing here holds a module or a state. Legend: N texts, B comparisons, K experts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefmix.mixture.estep import ESTEPS, EStep, EStepFunction
from prefmix.mixture.likelihoods.dr_dpo import distributionally_robust_sum
from prefmix.mixture.likelihoods.feedback import FeedbackRows, feedback_log_lik, marginal_log_lik, sides_of
from prefmix.mixture.likelihoods.model import PER_TOKEN, FeedbackModel
from prefmix.mixture.likelihoods.plackett_luce import Rankings
from prefmix.policy.mixture_model import MixtureOutput


class Likelihoods(NamedTuple):
    """What K experts say of B comparisons.

    Attributes:
        chosen_rewards: [B, K] r_k(x_i, y_w).
        rejected_rewards: [B, K] r_k(x_i, y_l).
        margins: [B, K] m_ik = r_k(x_i, y_w) - r_k(x_i, y_l).
        log_lik: [B, K] log p_ik, by default log[(1-e) sigmoid(m_ik) + e sigmoid(-m_ik)], nats; carries the gradient.
    """

    chosen_rewards: Float[Tensor, "B K"]
    rejected_rewards: Float[Tensor, "B K"]
    margins: Float[Tensor, "B K"]
    log_lik: Float[Tensor, "B K"]


def batch_rows(inputs: Mapping[str, Tensor], model: FeedbackModel) -> FeedbackRows:
    """What a batch of `data.collator` says of its texts.

    Args:
        inputs: the batch.
        model: lengths are counted where its rewards are per token.
    """
    num_tokens = None
    if model.loss_type in PER_TOKEN:
        num_tokens = completion_lengths(inputs)
    order = [inputs[name] for name in ("ranked", "ranked_size", "ranked_stages") if name in inputs]
    rankings = Rankings(*order) if order else None
    pair = inputs["chosen"], inputs["rejected"]
    return FeedbackRows(*pair, num_tokens, inputs.get("tie"), inputs.get("label"), rankings)


def completion_lengths(inputs: Mapping[str, Tensor]) -> Int[Tensor, "N"]:
    """Completion tokens that a batch holds of each text."""
    if "completion_mask" in inputs:
        return inputs["completion_mask"].sum(1)
    return torch.bincount(inputs["segments"], minlength=len(inputs["text_ids"]))


def likelihoods(
    output: MixtureOutput,
    inputs: Mapping[str, Tensor],
    *,
    beta: Float[Tensor, "K"],
    model: FeedbackModel,
    noise: Float[Tensor, "B"] | None = None,
) -> Likelihoods:
    """Log-likelihoods of a batch under every expert.

    Args:
        output: log-probabilities of the batch's N texts.
        inputs: the batch.
        beta: [K] beta_k.
        model: the observation model.
        noise: [B] learnt rates of whoever judged; None: the model's.
    """
    rows = batch_rows(inputs, model)._replace(noise=noise)
    lik = feedback_log_lik(output.log_probs, output.ref_log_probs, rows, beta, model)
    rewards = lik.rewards.detach()
    return Likelihoods(rewards[rows.chosen], rewards[rows.rejected], lik.margins.detach(), lik.log_lik)


def marginal_bound(
    output: MixtureOutput, inputs: Mapping[str, Tensor], *, beta: Float[Tensor, "K"], model: FeedbackModel
) -> Float[Tensor, "B"]:
    """[B] a_i log p(y_w > y_l) of the whole mixture, with gradient in experts and gate (`likelihood` not "mbt")."""
    sides = sides_of(output.log_probs, output.ref_log_probs, batch_rows(inputs, model))
    log_lik = marginal_log_lik(output.log_weights, sides, beta, model)
    return inputs["weight"].to(log_lik.dtype) * log_lik


def robust_bound(bound: Float[Tensor, "B"], weight: Float[Tensor, "B"], robustness: float | None) -> Float[Tensor, "B"]:
    """Rows whose sum is Dr. DPO's aggregate of the rows' bounds; the bounds themselves without `robustness`.

    Args:
        bound: [B] a_i times the bound of each row.
        weight: [B] a_i.
        robustness: beta', nats.
    """
    if robustness is None:
        return bound
    each = bound / torch.where(weight > 0, weight, 1.0).to(bound.dtype)
    return distributionally_robust_sum(each, weight, robustness)


class Taught(NamedTuple):
    """An M-step over B rows.

    Attributes:
        coefficient: [B, K] how strongly each row teaches each expert; 0: not at all.
        log_lik: [B, K] log p_ik, with gradient wherever the coefficient is not 0.
        log_weights: [B, K] log w of the row's gate, with gradient.
    """

    coefficient: Float[Tensor, "B K"]
    log_lik: Float[Tensor, "B K"]
    log_weights: Float[Tensor, "B K"]


def learners_of_texts(coefficient: Float[Tensor, "B K"], inputs: Mapping[str, Tensor]) -> Bool[Tensor, "N K"]:
    """Which experts must be differentiated on which texts: those that learn from a row that has the text."""
    learns = coefficient != 0
    if "ranked" in inputs:
        text, learns = inputs["ranked"], learns.repeat_interleave(inputs["ranked_size"], dim=0)
    else:
        text, learns = torch.cat([inputs["chosen"], inputs["rejected"]]), learns.repeat(2, 1)
    learners = learns.new_zeros(len(inputs["text_ids"]), coefficient.shape[1])
    place, expert = learns.nonzero(as_tuple=True)
    learners[text[place], expert] = True
    return learners


def held(resp: Float[Tensor, "B K"]) -> EStep:
    """The E-step while first responsibilities are held: q is given, whatever the experts say."""
    return EStep(resp, resp.log())


def estep_function(name: str, gumbel_hard: bool) -> EStepFunction:
    """The E-step that a configuration names: (log_weights, log_lik, *, temperature, generator) -> EStep."""
    return functools.partial(ESTEPS[name], hard=gumbel_hard) if name == "gumbel" else ESTEPS[name]
