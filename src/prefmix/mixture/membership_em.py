"""Continuous groups with linear rewards: experts, gate, loading and every user's q, fitted together.

    r_k(y) = c_k . f(y),   w(z_u) = softmax(gate + A z_u),   z_u ~ N(0, I_d)

    maximise  sum_i a_i mean_s log p_i(z_us) - sum_u KL(q_u || N(0, I)) + log prior(c, A, gate)

As for the probe, a linear reward under a ridge cannot memorise: this shows in seconds whether users are of a few types
or blend them. It starts from the best of several fits of the `user` latent: it begins where discrete groups end.
Legend: S draws, B comparisons, P features, G users, K experts, d latent dimensions.

Source: deterministic ADVI (Giordano et al. 2024) with L-BFGS; q is polished by the E-step of `membership_fit`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.mixture.lbfgs import maximise
from prefmix.mixture.linear_em import WEIGHT_CONCENTRATION, LinearEM, ProbeData, fit_linear_em, spread
from prefmix.mixture.membership import (
    LOADING_VARIANCE,
    Combination,
    GaussianQ,
    MembershipRows,
    initial_loading,
    kl_to_prior,
    predictive_log_weights,
    rows_log_lik,
    sample_z,
    standard_draws,
)
from prefmix.mixture.membership_fit import fit_users


class LinearMembership(NamedTuple):
    """What continuous groups are, without the users.

    Attributes:
        coefficients: [K, P] c_k, linear rewards.
        gate_log_weights: [K] log softmax(gate).
        loading: [K, d] A.
        combine: how margins become a probability.
    """

    coefficients: Float[Tensor, "K P"]
    gate_log_weights: Float[Tensor, "K"]
    loading: Float[Tensor, "K d"]
    combine: Combination


class MembershipEM(NamedTuple):
    """A fit.

    Attributes:
        model: experts, gate and loading.
        q: posteriors of the G users.
        elbo: sum over users, nats, at the fit's fixed draws.
        penalised: ELBO + log prior of coefficients, loading and gate, constants left out.
    """

    model: LinearMembership
    q: GaussianQ
    elbo: float
    penalised: float


def fit_membership(
    data: ProbeData,
    num_experts: int,
    dim: int,
    *,
    combine: Combination = "mixture",
    ridge: float = 1.0,
    pooling: float = 0.0,
    samples: int = 16,
    restarts: int = 4,
    max_steps: int = 200,
    generator: torch.Generator | None = None,
) -> MembershipEM:
    """Fits continuous groups.

    Args:
        data: comparisons; `group` is the user.
        num_experts: K.
        dim: d, at most K - 1 says everything.
        combine: `mixture` or `log_linear`.
        ridge: precision of the coefficients' prior.
        pooling: precision that draws rewards to their mean, on top of the ridge (`linear_em`); 0: independent rewards.
        samples: S, fixed draws for each user.
        restarts: starts of the discrete fit that this one begins with.
        max_steps: of L-BFGS.
        generator: of those starts; None seeds one with 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    discrete = fit_linear_em(
        data, num_experts, torch.full((restarts,), ridge), anneal=4.0, generator=generator,
        pooling=torch.full((restarts,), pooling) if pooling else None,
    )  # fmt: skip
    start = _start(data, discrete, dim, combine)
    noise = standard_draws(samples, dim).to(data.difference)
    q = fit_users(linear_rows(start, data), start.loading, combine, noise, steps=10).q
    parameters = [start.coefficients, start.gate_log_weights, start.loading, *q]
    parameters = [value.detach().clone().requires_grad_() for value in parameters]

    def objective() -> Tensor:
        model, q = _model(parameters, combine), GaussianQ(*parameters[3:])
        log_lik = rows_log_lik(linear_rows(model, data), model.loading, sample_z(q, noise.unsqueeze(1)), combine)
        elbo = (log_lik.mean(dim=0) * data.weight).sum() - kl_to_prior(q).sum()
        return elbo + _log_prior(model, ridge, pooling)

    maximise(objective, parameters, max_steps=max_steps, scale=float(data.weight.sum()), tolerance_change=1e-9)
    model = _model([value.detach() for value in parameters], combine)
    polished = fit_users(
        linear_rows(model, data), model.loading, combine, noise, start=GaussianQ(*parameters[3:]), steps=20
    )
    elbo = polished.elbo.sum()
    return MembershipEM(model, polished.q, float(elbo), float(elbo + _log_prior(model, ridge, pooling)))


def membership_predict(
    model: LinearMembership, difference: Float[Tensor, "B P"], q: GaussianQ, samples: int = 64
) -> Float[Tensor, "B"]:
    """Log-odds that the chosen text wins, under the mean weights E_q softmax(gate + A z) of each row's user.

    Args:
        model: of a fit.
        difference: [B, P] f(chosen) - f(rejected).
        q: of the user of each row, B of them.
        samples: draws of the expectation.
    """
    margins = difference @ model.coefficients.T
    noise = standard_draws(samples, model.loading.shape[1]).to(margins)
    gate = model.gate_log_weights.expand(len(margins), -1)
    weights = predictive_log_weights(gate, model.loading, q, noise).exp()
    if model.combine == "log_linear":
        return (weights * margins).sum(dim=1)
    return torch.logit((weights * margins.sigmoid()).sum(dim=1), eps=1e-12)


def linear_rows(model: LinearMembership, data: ProbeData) -> MembershipRows:
    """The comparisons of `data` as the model sees them."""
    margins = data.difference @ model.coefficients.T
    score = logsigmoid(margins) if model.combine == "mixture" else margins
    gate = model.gate_log_weights.expand(len(margins), -1)
    return MembershipRows(gate, score, data.group, data.weight, data.num_groups)


def _start(data: ProbeData, discrete: LinearEM, dim: int, combine: Combination) -> LinearMembership:
    """Experts and weights of the best discrete fit, and a loading in general position."""
    best = int(discrete.penalised.argmax())
    loading = initial_loading(discrete.log_weights.shape[1], dim, scale=2.0).to(data.difference)
    return LinearMembership(discrete.coefficients[best], discrete.log_weights[best], loading, combine)


def _model(parameters: list[Tensor], combine: Combination) -> LinearMembership:
    return LinearMembership(parameters[0], torch.log_softmax(parameters[1], dim=0), parameters[2], combine)


def _log_prior(model: LinearMembership, ridge: float, pooling: float) -> Float[Tensor, ""]:
    rewards = -0.5 * ridge * model.coefficients.square().sum() - 0.5 * pooling * spread(model.coefficients)
    gaussian = rewards - 0.5 / LOADING_VARIANCE * model.loading.square().sum()
    return gaussian + (WEIGHT_CONCENTRATION - 1.0) * model.gate_log_weights.sum()
