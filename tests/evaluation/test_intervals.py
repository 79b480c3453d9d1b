"""The cluster bootstrap against the sampling distribution it estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from prefmix.evaluation.intervals import Draw, cluster_bootstrap, nested_bootstrap, paired_difference


def test_independent_rows_give_the_textbook_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=400)
    estimate = cluster_bootstrap(values, np.full(400, -1))
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.se == pytest.approx(values.std(ddof=1) / 20, rel=0.1)
    assert estimate.clusters == 400


def test_repeating_a_persons_rows_narrows_nothing() -> None:
    values = np.random.default_rng(1).normal(size=100)
    once = cluster_bootstrap(values, np.arange(100))
    often = cluster_bootstrap(np.repeat(values, 50), np.repeat(np.arange(100), 50))
    assert often.se == pytest.approx(once.se, rel=1e-9)


def test_interval_covers_the_mean_at_its_level() -> None:
    rng = np.random.default_rng(2)
    covered, runs = 0, 200
    for run in range(runs):
        person = np.repeat(np.arange(60), 5)
        values = rng.normal(size=60)[person] + rng.normal(size=300)
        estimate = cluster_bootstrap(values, person, num_resamples=400, seed=run)
        covered += estimate.low <= 0.0 <= estimate.high
    assert 0.88 <= covered / runs <= 0.99


def test_equal_models_differ_by_exactly_nothing() -> None:
    values = np.random.default_rng(3).integers(0, 2, 50).astype(float)
    difference = paired_difference(values, values, np.arange(50) // 5)
    assert difference.mean == 0.0 and difference.low == 0.0 and difference.high == 0.0


def test_one_person_has_no_interval() -> None:
    estimate = cluster_bootstrap([1.0, 0.0], [3, 3])
    assert estimate.mean == 0.5 and math.isnan(estimate.se)
    assert cluster_bootstrap([], []).num_rows == 0


def test_nested_bootstrap_has_the_variance_of_both_levels() -> None:
    rng = np.random.default_rng(3)
    groups = [rng.normal(loc=rng.normal(), size=50) for _ in range(30)]

    def mean(draws: Sequence[Draw]) -> list[float]:
        values = [float(groups[draw.group][draw.members].mean()) for draw in draws]
        return [float(np.mean(values)), 7.0]

    moving, fixed = nested_bootstrap(mean, [50] * 30, num_resamples=400)
    means = np.array([group.mean() for group in groups])
    assert moving.value == pytest.approx(means.mean())
    # Var = Var(group means) / 30 + Var(members) / 50 / 30; the first already holds the second once.
    se = (means.var(ddof=1) / 30 + 1 / 1500) ** 0.5
    assert moving.high - moving.low == pytest.approx(2 * 1.96 * se, rel=0.2)
    assert fixed == (7, 7, 7)
