"""Minibatch EM with decaying steps for linear rewards: the stochastic algorithm at its smallest, to study convergence.

The same parts that train language models (running user evidence, exact E-steps of the batch's users, a global gate in
closed form, gradient steps on the bound), with linear experts, whose optimum full-batch EM can give for comparison.

    eta_t = first_step / (1 + t / decay)        sum eta_t = inf, sum eta_t^2 < inf

Legend: B comparisons, P features, G groups, K experts. Source: Neal & Hinton 1998; Cappé & Moulines 2009.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.mixture.linear_em import WEIGHT_CONCENTRATION, ProbeData
from prefmix.mixture.posterior import posterior
from prefmix.mixture.priors import map_log_weights
from prefmix.mixture.user_evidence import UserEvidence


class Steps(NamedTuple):
    """How the algorithm moves.

    Attributes:
        batch_size: rows a step.
        epochs: passes over the rows.
        first: eta_0, in coefficients for a unit of mean gradient.
        decay: steps after which eta is half of eta_0; infinite for a constant step.
    """

    batch_size: int = 60
    epochs: int = 60
    first: float = 6.0
    decay: float = 100.0


DEFAULT_STEPS = Steps()


class StochasticEM(NamedTuple):
    """Where it arrived.

    Attributes:
        log_weights: [K] log w.
        coefficients: [K, P] c_k.
    """

    log_weights: Float[Tensor, "K"]
    coefficients: Float[Tensor, "K P"]


def stochastic_linear_em(
    data: ProbeData,
    log_weights: Float[Tensor, "K"],
    coefficients: Float[Tensor, "K P"],
    ridge: float,
    *,
    generator: torch.Generator,
    steps: Steps = DEFAULT_STEPS,
) -> StochasticEM:
    """Minibatch EM from given parameters.

    A step draws rows without replacement, recomputes their log-likelihoods, takes q of their users from the running
    table, and moves

        c_k += eta_t [ sum_batch a_i q_ik (1 - p_ik) d_i / sum_batch a_i - ridge c_k / sum_all a_i ]
        w    = Dirichlet MAP of the last q of every user

    The table starts from one full pass, as the trainer's does after its held epoch.

    Args:
        data: the comparisons.
        log_weights: [K] log w to start from.
        coefficients: [K, P] c to start from.
        ridge: precision of the coefficients' prior, that of the whole objective.
        generator: source of the order of rows.
        steps: batch size, number and length of the steps.
    """
    log_w, c = log_weights.clone(), coefficients.clone()
    evidence, resp = _first_pass(data, log_w, c)
    filled = torch.bincount(data.group, minlength=data.num_groups) > 0
    prior = log_w.new_full(log_w.shape, WEIGHT_CONCENTRATION)
    total = data.weight.sum()
    step = 0
    for _ in range(steps.epochs):
        for row in torch.randperm(len(data.group), generator=generator).split(steps.batch_size):
            d, weight, group = data.difference[row], data.weight[row], data.group[row]
            margin = d @ c.T
            grouped = evidence.update(row, logsigmoid(margin))
            resp[group] = posterior(log_w.expand(len(row), -1), grouped).log_resp.exp().to(resp)
            pull = weight.unsqueeze(1) * resp[group] * torch.sigmoid(-margin)
            eta = steps.first / (1.0 + step / steps.decay)
            c = c + eta * (pull.T @ d / weight.sum() - ridge * c / total)
            log_w = map_log_weights(resp[filled].sum(dim=0), prior)
            step += 1
    return StochasticEM(log_w, c)


def _first_pass(
    data: ProbeData, log_weights: Float[Tensor, "K"], coefficients: Float[Tensor, "K P"]
) -> tuple[UserEvidence, Float[Tensor, "G K"]]:
    """The table with every row visited, and q of every group."""
    num_rows, num_experts = len(data.group), len(log_weights)
    table = UserEvidence(num_rows, num_experts, data.group, data.weight, data.num_groups, per_pair=False)
    every_row: Int[Tensor, "B"] = torch.arange(num_rows)
    table.update(every_row, logsigmoid(data.difference @ coefficients.T))
    grouped = table.group_evidence().to(log_weights)
    return table, posterior(log_weights.expand(data.num_groups, -1), grouped).log_resp.exp()
