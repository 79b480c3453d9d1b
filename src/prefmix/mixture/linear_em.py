"""Annealed EM for a mixture of linear Bradley-Terry rewards, batched over starts and experts.

The prior of the rewards is Gaussian, and may pool them (partial pooling of a hierarchical model):

    log p(c) = - ridge/2 sum_k |c_k|^2 - pooling/2 sum_k |c_k - mean_j c_j|^2

which is c_k = shared + deviation_k with deviation_k ~ N(0, 1/(ridge + pooling)) and shared ~ N(0, v), where
v = pooling / (K ridge (ridge + pooling)), the shared part integrated out. So `ridge` holds what all experts want in
common, and `ridge + pooling` what they want differently. 0: independent experts; infinite: one reward under K ridge.

Legend: B comparisons, P features, G groups, K experts, S starts. Source: Gelman & Hill 2007, chapter 12.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.mixture.posterior import group_log_lik, posterior
from prefmix.mixture.priors import map_log_weights
from prefmix.mixture.schedule import temperature

# One pseudo-group for each expert: no weight reaches zero.
WEIGHT_CONCENTRATION = 2.0
HALVINGS = 6
# Nats of spread over groups at which responsibilities mean something.
DECIDED = 2.0


class ProbeData(NamedTuple):
    """Comparisons as feature differences.

    Attributes:
        difference: [B, P] f(chosen) - f(rejected).
        group: [B] latent group, 0..G-1.
        weight: [B] row weights inside the group's likelihood.
        num_groups: G; groups without rows are allowed.
    """

    difference: Float[Tensor, "B P"]
    group: Int[Tensor, "B"]
    weight: Float[Tensor, "B"]
    num_groups: int

    def select(self, rows: Bool[Tensor, "B"]) -> ProbeData:
        """The rows of a mask, with the same groups."""
        return ProbeData(self.difference[rows], self.group[rows], self.weight[rows], self.num_groups)


class LinearEM(NamedTuple):
    """S fits.

    Attributes:
        log_resp: [S, G, K] log q_g at the final parameters; log w for groups without rows.
        log_weights: [S, K] log w.
        coefficients: [S, K, P] c_k.
        log_evidence: [S] sum_g log sum_k w_k prod_i p_ik, nats.
        penalised: [S] log evidence + log p(c) + sum_k (a - 1) log w_k (constants left out).
        trace: [iterations, S] penalised evidence before each M-step; it never falls once the temperature is 1.
    """

    log_resp: Float[Tensor, "S G K"]
    log_weights: Float[Tensor, "S K"]
    coefficients: Float[Tensor, "S K P"]
    log_evidence: Float[Tensor, "S"]
    penalised: Float[Tensor, "S"]
    trace: Float[Tensor, "iterations S"]


def fit_linear_em(
    data: ProbeData,
    num_experts: int,
    ridge: Float[Tensor, "S"],
    *,
    anneal: float,
    generator: torch.Generator,
    anneal_steps: int = 20,
    max_steps: int = 200,
    tolerance: float = 1e-7,
    weight_concentration: float = WEIGHT_CONCENTRATION,
    first_resp: Float[Tensor, "S G K"] | None = None,
    pooling: Float[Tensor, "S"] | None = None,
) -> LinearEM:
    """Generalised EM: exact E-steps (softened by a falling temperature), one safeguarded Newton step per M-step.

    Args:
        data: the comparisons.
        num_experts: K.
        ridge: [S] precision of the Gaussian prior of the coefficients, one for each start.
        anneal: temperature at the first step, at least 1.
        generator: source of the S random first responsibilities.
        anneal_steps: steps until the temperature is 1; only during these are dead experts revived. 0: plain EM.
        max_steps: steps in all.
        tolerance: relative gain of the penalised evidence below which a start counts as converged.
        weight_concentration: a >= 1 of the Dirichlet prior of the weights, the balance prior: 1 is flat, and each
            unit more is a pseudo-group for every expert, which draws the mean responsibilities together.
        first_resp: [S, G, K] responsibilities to start from, in place of random ones; rows of NaN are drawn.
        pooling: [S] precision that draws experts to their mean, on top of the ridge; None: 0, independent experts.
    """
    starts, difference = len(ridge), data.difference
    ridge = ridge.to(difference)
    pooling = None if pooling is None else pooling.to(difference)
    filled = torch.bincount(data.group, minlength=data.num_groups) > 0
    draws = torch.empty(starts, data.num_groups, num_experts).exponential_(generator=generator).to(difference)
    resp = draws / draws.sum(dim=-1, keepdim=True)
    if first_resp is not None:
        resp = torch.where(first_resp.isnan(), resp, first_resp.to(resp))
    coefficients = difference.new_zeros(starts, num_experts, difference.shape[1])
    trace: list[Tensor] = []
    for step in range(max_steps):
        coefficients = newton_step(data, resp, coefficients, ridge, pooling)
        log_weights = _weights(resp, filled, weight_concentration)
        log_resp, evidence = expectation(data, log_weights, coefficients)
        trace.append(evidence + log_prior(log_weights, coefficients, ridge, weight_concentration, pooling))
        if step < anneal_steps:
            tau = temperature(step / anneal_steps, anneal, 1.0)
            softened = log_resp / tau if step + 1 < anneal_steps else _leave_saddle(log_resp, filled)
            resp, coefficients = _revive(data, torch.softmax(softened, dim=-1), coefficients, filled)
        else:
            resp = log_resp.exp()
        if step > anneal_steps and bool((trace[-1] - trace[-2] <= tolerance * trace[-1].abs()).all()):
            break
    return LinearEM(log_resp, log_weights, coefficients, evidence, trace[-1], torch.stack(trace))


def expectation(
    data: ProbeData, log_weights: Float[Tensor, "S K"], coefficients: Float[Tensor, "S K P"]
) -> tuple[Float[Tensor, "S G K"], Float[Tensor, "S"]]:
    """Log posterior of every group and the summed log evidence, for all starts at once."""
    starts, num_experts, _ = coefficients.shape
    log_lik = logsigmoid(data.difference @ coefficients.flatten(0, 1).T)
    grouped = group_log_lik(log_lik, data.group, data.num_groups, data.weight)
    result = posterior(log_weights.repeat(data.num_groups, 1), grouped.view(data.num_groups * starts, num_experts))
    log_resp = result.log_resp.view(data.num_groups, starts, num_experts).transpose(0, 1)
    return log_resp, result.log_evidence.view(data.num_groups, starts).sum(dim=0)


def log_prior(
    log_weights: Float[Tensor, "S K"],
    coefficients: Float[Tensor, "S K P"],
    ridge: Float[Tensor, "S"],
    weight_concentration: float = WEIGHT_CONCENTRATION,
    pooling: Float[Tensor, "S"] | None = None,
) -> Float[Tensor, "S"]:
    """Log prior of coefficients and weights up to constants: log p(c) + (a - 1) sum log w, nats."""
    gaussian = -0.5 * ridge * coefficients.square().sum(dim=(1, 2))
    if pooling is not None:
        gaussian = gaussian - 0.5 * pooling * spread(coefficients)
    if weight_concentration == 1.0:
        return gaussian
    return gaussian + (weight_concentration - 1.0) * log_weights.sum(dim=1)


def spread(coefficients: Float[Tensor, "*S K P"]) -> Float[Tensor, "*S"]:
    """sum_k |c_k - mean_j c_j|^2."""
    return (coefficients - coefficients.mean(dim=-2, keepdim=True)).square().sum(dim=(-2, -1))


def newton_step(
    data: ProbeData,
    resp: Float[Tensor, "S G K"],
    coefficients: Float[Tensor, "S K P"],
    ridge: Float[Tensor, "S"],
    pooling: Float[Tensor, "S"] | None = None,
) -> Float[Tensor, "S K P"]:
    """One Newton step of the M-step's q-weighted logistic regressions, halved until their objective does not fall.

    The objective is sum_ik a_i q_gk log sigmoid(c_k . d_i) + log p(c), concave in c. Without pooling it falls apart
    into one for each expert, and so do the halvings.
    """
    starts, num_experts, _ = coefficients.shape
    flat = coefficients.flatten(0, 1)
    penalty = ridge.repeat_interleave(num_experts)
    row_weight = resp.transpose(0, 1).flatten(1)[data.group] * data.weight.unsqueeze(1)
    margin = data.difference @ flat.T
    wrong = torch.sigmoid(-margin)
    gradient = (row_weight * wrong).T @ data.difference - penalty.unsqueeze(1) * flat
    curvature = row_weight * wrong * (1.0 - wrong)
    # One product per start and expert: a batched one would hold S K copies of the differences.
    hessian = torch.stack([data.difference.T @ (data.difference * column.unsqueeze(1)) for column in curvature.T])
    hessian.diagonal(dim1=1, dim2=2).add_(penalty.unsqueeze(1))
    if pooling is None:
        direction = torch.linalg.solve(hessian, gradient.unsqueeze(2)).squeeze(2)
    else:
        away = coefficients - coefficients.mean(dim=1, keepdim=True)
        pulled = gradient.view_as(away) - pooling.view(-1, 1, 1) * away
        direction = _pooled_direction(hessian.unflatten(0, (starts, num_experts)), pulled, pooling).flatten(0, 1)

    def objective(c: Tensor, m: Tensor) -> Tensor:
        each = (row_weight * logsigmoid(m)).sum(dim=0) - 0.5 * penalty * c.square().sum(dim=1)
        if pooling is None:
            return each
        by_start = each.view(starts, num_experts).sum(dim=1) - 0.5 * pooling * spread(c.view_as(coefficients))
        return by_start.repeat_interleave(num_experts)

    return _backtrack(objective, flat, direction, margin, data.difference @ direction.T).view_as(coefficients)


def _pooled_direction(
    hessian: Float[Tensor, "S K P P"], gradient: Float[Tensor, "S K P"], pooling: Float[Tensor, "S"]
) -> Float[Tensor, "S K P"]:
    """Solves H_k x_k + pooling (x_k - mean x) = g_k for all experts of a start.

    With A_k = H_k + pooling I:   x_k = A_k^-1 (g_k + pooling mean x),   (sum_k A_k^-1 H_k) mean x = sum_k A_k^-1 g_k,
    as I - pooling A_k^-1 = A_k^-1 H_k. Nothing is subtracted, so any pooling is exact.
    """
    strength = pooling.view(-1, 1, 1)
    held = hessian.clone()
    held.diagonal(dim1=2, dim2=3).add_(strength)
    solved = torch.linalg.solve(held, torch.cat([hessian, gradient.unsqueeze(3)], dim=3)).sum(dim=1)
    mean = torch.linalg.solve(solved[..., :-1], solved[..., -1])
    return torch.linalg.solve(held, (gradient + strength * mean.unsqueeze(1)).unsqueeze(3)).squeeze(3)


def _backtrack(
    objective: Callable[[Tensor, Tensor], Tensor],
    flat: Float[Tensor, "SK P"],
    direction: Float[Tensor, "SK P"],
    margin: Float[Tensor, "B SK"],
    margin_step: Float[Tensor, "B SK"],
) -> Float[Tensor, "SK P"]:
    """Halves the step of the experts whose objective fell; one that cannot improve stays."""
    before = objective(flat, margin)
    size = torch.ones_like(before)
    for _ in range(HALVINGS):
        fell = objective(flat + size.unsqueeze(1) * direction, margin + size * margin_step) < before
        if not fell.any():
            break
        size = torch.where(fell, 0.5 * size, size)
    else:
        fell = objective(flat + size.unsqueeze(1) * direction, margin + size * margin_step) < before
        size = torch.where(fell, 0.0, size)
    return flat + size.unsqueeze(1) * direction


def _weights(resp: Float[Tensor, "S G K"], filled: Bool[Tensor, "G"], concentration: float) -> Float[Tensor, "S K"]:
    """Dirichlet MAP of the weights; groups without rows have no vote."""
    counts = resp[:, filled].sum(dim=1)
    return map_log_weights(counts, counts.new_full((counts.shape[1],), concentration))


def _leave_saddle(log_resp: Float[Tensor, "S G K"], filled: Bool[Tensor, "G"]) -> Float[Tensor, "S G K"]:
    """Spreads log responsibilities whose spread over groups is below DECIDED nats; leaves the others alone.

    Annealing with few rows a group can end at the saddle where all experts are equal. EM leaves it exponentially
    slowly at first, slower than any convergence test waits. What little the groups differ by there points the way.
    """
    centred = log_resp - log_resp[:, filled].mean(dim=1, keepdim=True)
    spread = centred[:, filled].std(dim=(1, 2), unbiased=False).view(-1, 1, 1)
    undecided = (spread < DECIDED) & (spread > 0)
    return torch.where(undecided, centred * (DECIDED / torch.where(undecided, spread, 1.0)), log_resp)


def _revive(
    data: ProbeData,
    resp: Float[Tensor, "S G K"],
    coefficients: Float[Tensor, "S K P"],
    filled: Bool[Tensor, "G"],
) -> tuple[Float[Tensor, "S G K"], Float[Tensor, "S K P"]]:
    """Gives an expert that lost its groups those that the others explain worst, and starts it at zero."""
    num_experts = resp.shape[2]
    usage = resp[:, filled].sum(dim=1)
    dead = usage < 0.1 * float(filled.sum()) / num_experts
    if not dead.any():
        return resp, coefficients
    resp, coefficients = resp.clone(), coefficients.clone()
    log_lik = logsigmoid(data.difference @ coefficients.flatten(0, 1).T)
    row_weight = group_log_lik(data.weight.unsqueeze(1), data.group, data.num_groups)
    mean = group_log_lik(log_lik, data.group, data.num_groups, data.weight) / row_weight
    mean = mean.view(data.num_groups, *resp.shape[::2])
    taken = max(1, int(filled.sum()) // (2 * num_experts))
    for s, k in dead.nonzero().tolist():
        explained = (resp[s] * mean[:, s]).sum(dim=1).masked_fill(~filled, torch.inf)
        worst = explained.nan_to_num(nan=torch.inf).topk(taken, largest=False).indices
        resp[s, worst] = 0.0
        resp[s, worst, k] = 1.0
        coefficients[s, k] = 0.0
    return resp, coefficients
