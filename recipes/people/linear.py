"""Who a person is, in linear rewards of fixed features: five answers to the same comparisons.

    single       one reward c . f for everybody
    user         one of K rewards a person                                   (latent="user")
    membership   a blend of K rewards a person, one judges each comparison   (latent="membership")
    log_linear   a blend of K rewards a person, summed: PAL, LoRe, VPL       (combine="log_linear")
    own          everybody a reward c_u ~ N(c_single, 1/tau) of their own: no types, P numbers a person

Legend: B comparisons, P features, U users, K rewards.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.mixture.linear_em import ProbeData, fit_linear_em
from prefmix.mixture.membership import GaussianQ, predictive_log_weights, standard_draws
from prefmix.mixture.membership_em import LinearMembership, fit_membership, linear_rows, membership_predict
from prefmix.mixture.membership_fit import fit_users
from prefmix.mixture.posterior import group_log_lik, posterior
from prefmix.mixture.spectral import spectral_resp, summed_differences
from prefmix.mixture.split_merge import split_and_merge

STARTS, DRAWS = 3, 8
EM_STEPS, LBFGS_STEPS = 80, 50
# Holds what all rewards share, K experts together: single DPO's validation loss is flat up to here on all sets.
SHARED_RIDGE = 64.0
OWN_STEPS = 8

# Twelve configurations for each method. `weight` counts a row as so much: comparisons drawn from ratings share them, so
# a hundred rows are not a hundred independent answers. The prior is scaled alike, so it means the same at any weight.
# `pooling` draws rewards to their mean (`mixture.linear_em`): what people want differently is held by it, what they
# share by SHARED_RIDGE alone. Weak, stronger with rows that count less, and so strong that few rows decide nothing.
POOLED = ((1.0, 256.0), (0.4, 1024.0), (0.15, 1024.0), (1.0, 4096.0))


def _pooled(counts: tuple[int, ...]) -> list[dict[str, float]]:
    return [{"experts": k, "weight": w, "pooling": p} for k, (w, p) in itertools.product(counts, POOLED)]


GRIDS: dict[str, list[dict[str, float]]] = {
    "single": [{"ridge": 4.0**power} for power in range(-5, 7)],
    "user": _pooled((2, 4, 8)),
    "membership": _pooled((2, 3, 4)),
    "log_linear": _pooled((2, 3, 4)),
    "own": [{"tau": 2.0**power} for power in range(1, 13)],
}
METHODS = tuple(GRIDS)


class Types(NamedTuple):
    """`single` and `user`: [K, P] rewards, [K] log shares, [U, K] log posteriors of people."""

    coefficients: Tensor
    log_weights: Tensor
    log_resp: Tensor


class Blends(NamedTuple):
    """`membership` and `log_linear`: the model and everybody's q."""

    model: LinearMembership
    q: GaussianQ


class Own(NamedTuple):
    """`own`: [U, P] rewards, the [P] centre they are drawn to, and how strongly."""

    coefficients: Tensor
    centre: Tensor
    tau: float


Model = Types | Blends | Own


def fit(method: str, config: Mapping[str, float], data: ProbeData, seed: int, single: Types | None = None) -> Model:
    """Fits a method.

    Args:
        method: one of METHODS.
        config: an entry of its grid.
        data: training comparisons, `group` is the user.
        seed: of the starts.
        single: the fit of `single`, which `own` is drawn to.
    """
    if method == "own":
        assert single is not None
        centre = single.coefficients[0]
        return Own(own_rewards(data, centre, config["tau"]), centre, config["tau"])
    generator = torch.Generator().manual_seed(seed)
    if method == "single":
        return _types(data, 1, config["ridge"], generator)
    experts, weight = int(config["experts"]), config["weight"]
    data, ridge, pooling = data._replace(weight=weight * data.weight), SHARED_RIDGE / experts, config["pooling"]
    ridge, pooling = weight * ridge, weight * pooling
    if method == "user":
        return _types(data, experts, ridge, generator, pooling)
    found = fit_membership(
        data, experts, experts - 1, combine="mixture" if method == "membership" else "log_linear", ridge=ridge,
        pooling=pooling, samples=DRAWS, restarts=STARTS, max_steps=LBFGS_STEPS, generator=generator,
    )  # fmt: skip
    return Blends(found.model, found.q)


def adapt(model: Model, context: ProbeData, weight: float = 1.0) -> Model:
    """The same model with other people, known by their comparisons in `context` alone, each counted as `weight`."""
    context = context._replace(weight=weight * context.weight)
    if isinstance(model, Types):
        log_lik = logsigmoid(context.difference @ model.coefficients.T)
        grouped = group_log_lik(log_lik, context.group, context.num_groups, context.weight)
        prior = model.log_weights.expand(context.num_groups, -1)
        return model._replace(log_resp=posterior(prior, grouped).log_resp)
    if isinstance(model, Own):
        return model._replace(coefficients=own_rewards(context, model.centre, model.tau))
    noise = standard_draws(2 * DRAWS, model.model.loading.shape[1]).to(context.difference)
    rows = linear_rows(model.model, context)
    return Blends(model.model, fit_users(rows, model.model.loading, model.model.combine, noise).q)


def log_odds(model: Model, difference: Tensor, user: Tensor) -> Tensor:
    """[B] log-odds that the chosen text wins, each row for its person."""
    if isinstance(model, Own):
        return (difference * model.coefficients[user]).sum(dim=1)
    if isinstance(model, Blends):
        return membership_predict(model.model, difference, model.q.select(user))
    # In float64: a probability of float32 next to 1 has no log-odds left.
    weights, margins = model.log_resp[user].double().exp(), difference.double() @ model.coefficients.double().T
    return torch.logit((weights * margins.sigmoid()).sum(dim=1), eps=1e-12)


def directions(model: Model) -> Tensor:
    """[U, P] everybody's mean reward, by which things are ranked."""
    if isinstance(model, Own):
        return model.coefficients
    if isinstance(model, Types):
        return model.log_resp.exp() @ model.coefficients
    noise = standard_draws(64, model.model.loading.shape[1])
    gate = model.model.gate_log_weights.expand(len(model.q.mean), -1)
    return predictive_log_weights(gate, model.model.loading, model.q, noise).exp() @ model.model.coefficients


def own_rewards(data: ProbeData, centre: Tensor, tau: float) -> Tensor:
    """[U, P] maximum of sum_i log sigmoid(c_u . d_i) - tau/2 |c_u - centre|^2 for every person, by Newton's method.

    Concave in c_u; from the centre, full steps suffice under the grid's tau (a step that fell is halved).
    """
    padded, mask = _by_user(data)
    found = centre.expand(data.num_groups, -1).clone()

    def objective(c: Tensor) -> Tensor:
        fitted = (logsigmoid((padded @ c.unsqueeze(2)).squeeze(2)) * mask).sum(dim=1)
        return fitted - 0.5 * tau * (c - centre).square().sum(dim=1)

    for _ in range(OWN_STEPS):
        wrong = torch.sigmoid(-(padded @ found.unsqueeze(2)).squeeze(2)) * mask
        gradient = (wrong.unsqueeze(2) * padded).sum(dim=1) - tau * (found - centre)
        curvature = (wrong * (1.0 - wrong)).unsqueeze(2)
        hessian = padded.transpose(1, 2) @ (curvature * padded) + tau * torch.eye(padded.shape[2])
        step, before = torch.linalg.solve(hessian, gradient), objective(found)
        for _ in range(4):
            fell = objective(found + step) < before
            step = torch.where(fell.unsqueeze(1), 0.5 * step, step)
        found = found + step
    return found


def _types(
    data: ProbeData, experts: int, ridge: float, generator: torch.Generator, pooling: float | None = None
) -> Types:
    """Annealed EM from random starts and a spectral one, then one round of split and merge."""
    starts = 1 if experts == 1 else STARTS
    first = torch.full((starts, data.num_groups, experts), torch.nan)
    if starts > 1:
        first[-1] = spectral_resp(summed_differences(data), experts, generator)
    found = fit_linear_em(
        data, experts, torch.full((starts,), ridge), anneal=4.0, generator=generator, max_steps=EM_STEPS,
        tolerance=1e-5, first_resp=first, pooling=None if pooling is None else torch.full((starts,), pooling),
    )  # fmt: skip
    best = split_and_merge(data, found, ridge, rounds=1, max_steps=EM_STEPS, pooling=pooling)
    return Types(best.coefficients[0], best.log_weights[0], best.log_resp[0])


def _by_user(data: ProbeData) -> tuple[Tensor, Tensor]:
    """[U, n, P] everybody's differences, padded with zeros to the most that anyone has, and the [U, n] mask."""
    count = torch.bincount(data.group, minlength=data.num_groups)
    order = torch.argsort(data.group, stable=True)
    place = torch.arange(len(order)) - (count.cumsum(0) - count).repeat_interleave(count)
    padded = data.difference.new_zeros(data.num_groups, int(count.max()), data.difference.shape[1])
    padded[data.group[order], place] = data.difference[order]
    mask = torch.arange(padded.shape[1]) < count.unsqueeze(1)
    return padded, mask.to(padded)


def describe(model: Model) -> dict[str, Any]:
    """What a fit says of people: their shares by type, or how far they lie apart."""
    if isinstance(model, Types):
        return {"shares": model.log_weights.exp().tolist()}
    if isinstance(model, Blends):
        return {"active_variance": model.q.mean.var(dim=0, unbiased=False).tolist()}
    apart = (model.coefficients - model.centre).norm(dim=1).mean() / model.centre.norm()
    return {"distance_over_centre": float(apart)}
