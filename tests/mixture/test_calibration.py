"""Simulation-based calibration of the posterior over experts (Talts et al. 2018), with a wrong posterior as control."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.nn.functional import logsigmoid

from prefmix.mixture.estep import ESTEPS
from prefmix.mixture.posterior import group_log_lik

USERS, DRAWS, BINS = 4000, 99, 20
TASTES = torch.tensor([[1.5, 0.0, 0.5], [-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
LOG_WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()


def _simulated_posteriors(rows: int, counted: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Experts drawn from the gate, answers from the experts, and q of the true experts: z [U], q [U, K]."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.multinomial(LOG_WEIGHTS.exp(), USERS, replacement=True, generator=generator)
    group = torch.arange(USERS).repeat_interleave(rows)
    difference = torch.randn(USERS * rows, 3, generator=generator, dtype=torch.float64)
    right = torch.sigmoid((difference * TASTES[expert[group]]).sum(1))
    lost = torch.rand(len(right), generator=generator, dtype=torch.float64) > right
    margins = torch.where(lost, -1.0, 1.0).unsqueeze(1) * (difference @ TASTES.T)
    grouped = counted * group_log_lik(logsigmoid(margins), group, USERS)
    resp = ESTEPS["exact"](LOG_WEIGHTS.expand(USERS, -1), grouped).resp
    return expert.numpy(), resp.numpy()


def _rank_p_value(expert: np.ndarray, resp: np.ndarray, seed: int = 0) -> float:
    """Chi-square p of randomised ranks of z among draws from q: uniform on 0..DRAWS where q is the posterior."""
    rng = np.random.default_rng(seed)
    uniform = rng.random((len(expert), DRAWS, 1))
    draws = (uniform > resp.cumsum(axis=1)[:, None, :-1]).sum(axis=2)
    below = (draws < expert[:, None]).sum(axis=1)
    # An expert is a name, not a number: equal draws go to either side by chance.
    rank = below + rng.integers(0, (draws == expert[:, None]).sum(axis=1) + 1)
    return float(chisquare(np.bincount(rank * BINS // (DRAWS + 1), minlength=BINS)).pvalue)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_ranks_of_the_true_expert_are_uniform(rows: int) -> None:
    assert _rank_p_value(*_simulated_posteriors(rows)) > 0.01


@pytest.mark.parametrize(("rows", "counted"), [(3, 2.0), (8, 2.0), (8, 0.5)])
def test_evidence_counted_twice_or_by_half_fails(rows: int, counted: float) -> None:
    assert _rank_p_value(*_simulated_posteriors(rows, counted)) < 1e-4


def test_a_posterior_that_forgot_the_gate_fails() -> None:
    expert, resp = _simulated_posteriors(3)
    flat = resp / LOG_WEIGHTS.exp().numpy()
    assert _rank_p_value(expert, flat / flat.sum(axis=1, keepdims=True)) < 1e-4


def test_probabilities_of_each_expert_are_frequencies() -> None:
    """Reliability: in bins of q_k, the share of users whose expert is k, within four standard errors."""
    expert, resp = _simulated_posteriors(3)
    for k in range(resp.shape[1]):
        cell = np.minimum((resp[:, k] * 10).astype(int), 9)
        for b in range(10):
            here = cell == b
            if here.sum() < 50:
                continue
            expected = resp[here, k].mean()
            error = np.sqrt((resp[here, k] * (1 - resp[here, k])).sum()) / here.sum()
            assert abs((expert[here] == k).mean() - expected) < 4 * error + 1e-9
