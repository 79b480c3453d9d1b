"""Weights for unknown users against linear programs, grids, and what each objective promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from prefmix.mixture.group_objectives import (
    average_weights,
    max_min_weights,
    min_max_regret_weights,
    worst_group_weights,
)

F64 = torch.float64


def _linear_program(utility: np.ndarray) -> float:
    """The largest v with U w >= v, w in the simplex."""
    types, experts = utility.shape
    cost = np.r_[np.zeros(experts), -1.0]
    bound = np.c_[-utility, np.ones(types)]
    found = linprog(
        cost, bound, np.zeros(types), [np.r_[np.ones(experts), 0.0]], [1.0], [(0, 1)] * experts + [(None, None)]
    )
    return -found.fun


@pytest.mark.parametrize("seed", range(20))
def test_games_are_solved_as_by_a_linear_program(seed):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 7)), int(rng.integers(1, 7)))
    utility = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4)
    if seed % 4 == 0:
        utility = np.round(utility / np.abs(utility).max() * 3)  # ties: degenerate corners
    for solve, game in (
        (max_min_weights, utility),
        (min_max_regret_weights, utility - utility.max(axis=1, keepdims=True)),
    ):
        found = solve(torch.from_numpy(utility))
        scale = max(np.abs(utility).max(), 1e-12)
        assert found.value == pytest.approx(_linear_program(game), abs=1e-8 * scale)
        assert found.gap <= 1e-8 * scale
        assert (found.weights >= 0).all() and float(found.weights.sum()) == pytest.approx(1.0)
        worst = game @ found.weights.numpy()
        assert float(found.adversary.numpy() @ (worst - worst.min())) <= 1e-7 * scale  # it lies on the worst types


def test_regret_does_not_follow_a_type_that_nobody_serves():
    utility = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-9.0, -10.0]], dtype=F64)
    assert max_min_weights(utility).weights.tolist() == [1.0, 0.0]
    torch.testing.assert_close(min_max_regret_weights(utility).weights, torch.tensor([0.5, 0.5], dtype=F64))


def _log_lik(seed: int, groups: int = 4, rows: int = 12, experts: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(groups).repeat_interleave(rows)[: groups * rows - 5]  # unequal groups
    lean = 1.5 * torch.randn(groups, experts, dtype=F64, generator=generator)
    noise = torch.randn(len(group), experts, dtype=F64, generator=generator)
    return torch.nn.functional.logsigmoid(lean[group] + noise), group


def _per_group(log_lik: np.ndarray, group: np.ndarray, weights: np.ndarray) -> np.ndarray:
    row = np.log(np.exp(log_lik) @ weights)
    return np.array([row[group == g].mean() for g in np.unique(group)])


@pytest.mark.parametrize("seed", range(3))
def test_average_weights_are_the_maximum_of_the_mean_over_groups(seed):
    log_lik, group = _log_lik(seed)
    found = average_weights(log_lik, group, 4)
    assert 0 <= found.gap < 1e-7
    assert found.value == pytest.approx(_per_group(log_lik.numpy(), group.numpy(), found.weights.numpy()).mean())
    rng = np.random.default_rng(0)
    for other in rng.dirichlet(np.ones(3), size=300):
        assert _per_group(log_lik.numpy(), group.numpy(), other).mean() <= found.value + 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_worst_group_weights_are_the_optimum_of_the_epigraph(seed):
    log_lik, group = _log_lik(seed)
    found = worst_group_weights(log_lik, group, 4)
    arrays = log_lik.numpy(), group.numpy()
    best = minimize(
        lambda x: -x[3],
        np.r_[np.full(3, 1 / 3), -5.0],
        constraints=[
            {"type": "ineq", "fun": lambda x: _per_group(*arrays, np.maximum(x[:3], 1e-12)) - x[3]},
            {"type": "eq", "fun": lambda x: x[:3].sum() - 1},
        ],
        bounds=[(0, 1)] * 3 + [(None, None)],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert found.value == pytest.approx(-best.fun, abs=2e-3)
    assert found.value + found.gap >= -best.fun - 1e-6  # the gap is honest
    assert found.gap < 5e-3
    assert found.value >= _per_group(*arrays, average_weights(log_lik, group, 4).weights.numpy()).min() - 1e-3


def test_rows_repeated_within_their_group_change_nothing_and_empty_groups_are_named():
    log_lik, group = _log_lik(7)
    twice = torch.cat([log_lik, log_lik[group == 1]]), torch.cat([group, group[group == 1]])
    torch.testing.assert_close(average_weights(log_lik, group, 4).weights, average_weights(*twice, 4).weights)
    extreme = average_weights(log_lik - 1e4, group, 4)
    torch.testing.assert_close(extreme.weights, average_weights(log_lik, group, 4).weights)
    with pytest.raises(ValueError, match=r"groups \[4\] have no comparisons"):
        worst_group_weights(log_lik, group, 5)
