"""The objective of one batch as pure functions: log-probabilities -> margins -> likelihoods, and the E-step by name.

Nothing here holds a module or a state. Legend: N texts, B comparisons, K experts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefmix.mixture.bradley_terry import implicit_rewards, margins, preference_log_lik
from prefmix.mixture.estep import ESTEPS, EStep, EStepFunction
from prefmix.policy.mixture_model import MixtureOutput


class Likelihoods(NamedTuple):
    """What K experts say of B comparisons.

    Attributes:
        chosen_rewards: [B, K] r_k(x_i, y_w).
        rejected_rewards: [B, K] r_k(x_i, y_l).
        margins: [B, K] m_ik = r_k(x_i, y_w) - r_k(x_i, y_l).
        log_lik: [B, K] log p_ik = log[(1-e) sigmoid(m_ik) + e sigmoid(-m_ik)], nats; carries the gradient.
    """

    chosen_rewards: Float[Tensor, "B K"]
    rejected_rewards: Float[Tensor, "B K"]
    margins: Float[Tensor, "B K"]
    log_lik: Float[Tensor, "B K"]


def likelihoods(
    output: MixtureOutput,
    chosen: Int[Tensor, "B"],
    rejected: Int[Tensor, "B"],
    *,
    beta: Float[Tensor, "K"],
    label_noise: float,
) -> Likelihoods:
    """Bradley-Terry log-likelihoods of a batch under every expert.

    Args:
        output: log-probabilities of the batch's N texts.
        chosen: [B] index among the batch's texts.
        rejected: [B] index among the batch's texts.
        beta: [K] beta_k.
        label_noise: e, share of flipped labels.
    """
    rewards_NK = implicit_rewards(output.log_probs, output.ref_log_probs, beta)
    margins_BK = margins(rewards_NK, chosen, rejected)
    log_lik_BK = preference_log_lik(margins_BK, label_noise)
    return Likelihoods(rewards_NK[chosen].detach(), rewards_NK[rejected].detach(), margins_BK.detach(), log_lik_BK)


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


def learners_of_texts(
    coefficient: Float[Tensor, "B K"], chosen: Int[Tensor, "B"], rejected: Int[Tensor, "B"], num_texts: int
) -> Bool[Tensor, "N K"]:
    """Which experts must be differentiated on which texts: those that learn from a row that has the text."""
    learners = torch.zeros(num_texts, coefficient.shape[1], dtype=torch.bool, device=coefficient.device)
    row, expert = (coefficient != 0).nonzero(as_tuple=True)
    for text in (chosen, rejected):
        learners[text[row], expert] = True
    return learners


def held(resp: Float[Tensor, "B K"]) -> EStep:
    """The E-step while first responsibilities are held: q is given, whatever the experts say."""
    return EStep(resp, resp.log())


def estep_function(name: str, gumbel_hard: bool) -> EStepFunction:
    """The E-step that a configuration names: (log_weights, log_lik, *, temperature, generator) -> EStep."""
    return functools.partial(ESTEPS[name], hard=gumbel_hard) if name == "gumbel" else ESTEPS[name]
