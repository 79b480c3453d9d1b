"""Simulation-based calibration of a user's posterior: is the true z as likely to rank anywhere among its draws?

z ~ N(0, I), comparisons from the model at z, draws of the posterior given these comparisons: then the rank of the true
z_d among L draws is uniform on 0..L (Talts et al. 2018). Importance-resampled draws should pass; draws of the Gaussian
q itself need not, and by how much they fail is reported. Experts, gate and loading are the true ones: calibration is a
property of the inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.membership import (
    GaussianQ,
    MembershipRows,
    log_importance,
    membership_log_weights,
    resample,
    rows_log_lik,
    sample_z,
    standard_draws,
)
from prefmix.mixture.membership_fit import fit_users

EXPERTS, DIM, PER_USER, NUM_RANKS, CHUNK = 3, 2, 16, 20, 100
LOADING = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]])
# Draws come from a wider Gaussian than q, so that no importance weight can explode.
WIDENING = 0.4


def run(num_users: int, num_draws: int, seed: int = 0) -> dict[str, Any]:
    """Chi-square p-values of the ranks of simulated users, and how often central 90% intervals hold the truth."""
    generator = torch.Generator().manual_seed(seed)
    ranks: dict[str, list[Tensor]] = {"importance_resampled": [], "gaussian_q": []}
    for first in range(0, num_users, CHUNK):
        size = min(CHUNK, num_users - first)
        truth, rows = _simulate(size, generator)
        for name, found in _ranks(truth, rows, num_draws, generator).items():
            ranks[name].append(found)
    return {
        "users": num_users,
        "comparisons_each": PER_USER,
        **{name: _report(torch.cat(parts)) for name, parts in ranks.items()},
    }


def _simulate(num_users: int, generator: torch.Generator) -> tuple[Tensor, MembershipRows]:
    z = torch.randn(num_users, DIM, generator=generator)
    user = torch.arange(num_users).repeat_interleave(PER_USER)
    margins = 3.0 * torch.randn(len(user), EXPERTS, generator=generator)
    gate = torch.tensor([0.5, 0.3, 0.2]).log().expand(len(user), -1)
    weights = membership_log_weights(gate, LOADING, z[user].unsqueeze(0))[0].exp()
    won = torch.rand(len(user), generator=generator) < (weights * margins.sigmoid()).sum(1)
    margins = torch.where(won.unsqueeze(1), margins, -margins)
    return z, MembershipRows(gate, preference_log_lik(margins), user, torch.ones(len(user)), num_users)


def _ranks(truth: Tensor, rows: MembershipRows, num_draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    q = fit_users(rows, LOADING, "mixture", standard_draws(32, DIM)).q
    wide = GaussianQ(q.mean, q.log_std + WIDENING)
    z = sample_z(wide, torch.randn(num_draws, len(truth), DIM, generator=generator))
    importance = log_importance(rows_log_lik(rows, LOADING, z, "mixture"), rows, wide, z)
    exact = resample(z, importance, NUM_RANKS - 1, generator)
    gaussian = sample_z(q, torch.randn(NUM_RANKS - 1, len(truth), DIM, generator=generator))
    return {"importance_resampled": (exact < truth).sum(0), "gaussian_q": (gaussian < truth).sum(0)}


def _report(ranks: Tensor) -> dict[str, Any]:
    """p-values of uniformity in every dimension, and how often the truth is within the draws' central 90%."""
    inside = ((ranks >= 1) & (ranks < NUM_RANKS - 1)).double().mean(0)
    return {"chi_square_p": [chi_square_p(column) for column in ranks.T], "central_90_percent": inside.tolist()}


def chi_square_p(ranks: Tensor) -> float:
    """p-value of Pearson's test that ranks are uniform on 0..NUM_RANKS-1."""
    observed = torch.bincount(ranks, minlength=NUM_RANKS).double()
    statistic = ((observed - observed.mean()).square() / observed.mean()).sum()
    return torch.special.gammaincc(torch.tensor((NUM_RANKS - 1) / 2).double(), statistic / 2).item()
