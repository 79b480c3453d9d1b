"""Hypervolume against Monte Carlo and inclusion-exclusion."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prefmix.evaluation.pareto import hypervolume, non_dominated, simplex_grid


def _inclusion_exclusion(points: np.ndarray) -> float:
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            total += (-1) ** (size + 1) * float(np.prod(np.min(subset, axis=0)))
    return total


@pytest.mark.parametrize("num_rewards", [1, 2, 3, 4])
def test_hypervolume_is_the_union_of_boxes(num_rewards: int) -> None:
    rng = np.random.default_rng(num_rewards)
    for _ in range(5):
        points = rng.uniform(0.1, 1, size=(7, num_rewards)).round(1)  # ties on purpose
        corner = np.full(num_rewards, -0.5)
        assert hypervolume(points - 0.5, corner) == pytest.approx(_inclusion_exclusion(points))


def test_points_below_the_corner_or_dominated_add_nothing() -> None:
    points, corner = np.array([[1.0, 2.0], [2.0, 1.0]]), np.zeros(2)
    assert hypervolume(points, corner) == 3
    assert hypervolume(np.vstack([points, [[1, 1], [5, -1], [1, 2]]]), corner) == 3
    assert hypervolume(-points, corner) == 0


def test_non_dominated_keeps_equal_points_and_drops_beaten_ones() -> None:
    points = np.array([[1, 1], [1, 1], [0, 1], [2, 0], [2, -1]], dtype=float)
    assert non_dominated(points).tolist() == [True, True, False, True, False]


def test_simplex_grid_has_every_multiple_once() -> None:
    grid = simplex_grid(3, 4)
    assert len(grid) == 15 == len(np.unique(grid, axis=0))
    np.testing.assert_allclose(grid.sum(axis=1), 1)
    assert {tuple(row) for row in grid} >= {(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.25, 0.25)}
