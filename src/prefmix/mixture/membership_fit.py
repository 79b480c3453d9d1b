"""The E-step of continuous groups: each user's Gaussian q, fitted to all of their comparisons at given experts.

This is what a new user gets without an encoder, and what training does between steps of the experts. Users do not
touch each other: fitted together or alone they get the same q. Legend: S draws, B rows, G users, K experts, d latent
dimensions.

Source: the natural gradient of a Gaussian, Khan & Nielsen 2018 (arXiv 1807.04489); the precision's by Stein's identity,
with fixed draws, so that its fixed points are the stationary points of the same deterministic bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.membership import Combination, GaussianQ, MembershipRows, kl_to_prior, rows_log_lik, sample_z

# A mixture's log-likelihood is not concave: a precision may come out below the prior's 1, but stays positive.
MIN_PRECISION = 0.1


class UserFit(NamedTuple):
    """Fitted users.

    Attributes:
        q: of G users; the prior for users without comparisons.
        elbo: [G] mean_s sum_i a_i log p_i(z_s) - KL(q || N(0, I)), nats, at the fixed draws.
    """

    q: GaussianQ
    elbo: Float[Tensor, "G"]


class _Look(NamedTuple):
    """The bound of every user and d log p / dz at every draw."""

    elbo: Float[Tensor, "G"]
    slope: Float[Tensor, "S G d"]


def fit_users(
    rows: MembershipRows,
    loading: Float[Tensor, "K d"],
    combine: Combination,
    noise: Float[Tensor, "S d"],
    *,
    start: GaussianQ | None = None,
    steps: int = 50,
    tolerance: float = 1e-6,
) -> UserFit:
    """Maximises each user's bound over mean and standard deviations; never lowers it.

    A step is the natural gradient's, lambda' = (1 - r) lambda + r (1 - E[noise * slope] / std) and
    mean' = mean + r (E[slope] - mean) / lambda'; a user whose bound fell takes it back and halves r.

    Args:
        rows: all comparisons of G users at the experts as they are.
        loading: [K, d] A.
        combine: `mixture` or `log_linear`.
        noise: [S, d] fixed draws (`standard_draws`), the same for every user.
        start: where to begin; None: the prior.
        steps: at most so many.
        tolerance: stops when no user gains more, nats.

    Returns:
        UserFit, detached.
    """
    noise = noise.to(loading).unsqueeze(1)
    zeros = loading.new_zeros(rows.num_users, loading.shape[1])
    q = GaussianQ(zeros, zeros) if start is None else GaussianQ(start.mean.detach(), start.log_std.detach())
    here, rate = _look(rows, loading, combine, noise, q), loading.new_ones(rows.num_users)
    for _ in range(steps):
        proposal = _natural_step(q, here.slope, noise, rate.unsqueeze(1))
        there = _look(rows, loading, combine, noise, proposal)
        better = there.elbo >= here.elbo
        gain = torch.where(better, there.elbo - here.elbo, torch.inf if bool((rate > 1e-3).any()) else 0.0)
        chosen = better.unsqueeze(1)
        q = GaussianQ(*(torch.where(chosen, new, old) for new, old in zip(proposal, q)))
        here = _Look(torch.where(better, there.elbo, here.elbo), torch.where(chosen, there.slope, here.slope))
        rate = torch.where(better, (1.5 * rate).clamp(max=1.0), 0.5 * rate)
        if not rows.num_users or float(gain.max()) < tolerance:
            break
    return UserFit(q, here.elbo)


def _look(
    rows: MembershipRows,
    loading: Float[Tensor, "K d"],
    combine: Combination,
    noise: Float[Tensor, "S 1 d"],
    q: GaussianQ,
) -> _Look:
    with torch.enable_grad():
        z = sample_z(q, noise).detach().requires_grad_()
        weighted = rows_log_lik(rows, loading.detach(), z, combine) * rows.weight.to(z.dtype)
        by_user = weighted.new_zeros(len(z), rows.num_users).index_add(1, rows.user, weighted)
        (slope,) = torch.autograd.grad(by_user.sum(), z)
    return _Look(by_user.detach().mean(dim=0) - kl_to_prior(q).sum(dim=-1), slope)


def _natural_step(
    q: GaussianQ, slope: Float[Tensor, "S G d"], noise: Float[Tensor, "S 1 d"], rate: Float[Tensor, "G 1"]
) -> GaussianQ:
    curvature = -(noise * slope).mean(dim=0) * (-q.log_std).exp()
    precision = (1.0 - rate) * (-2.0 * q.log_std).exp() + rate * (1.0 + curvature).clamp(min=MIN_PRECISION)
    mean = q.mean + rate * (slope.mean(dim=0) - q.mean) / precision
    return GaussianQ(mean, -0.5 * precision.log())
