"""The cluster bootstrap against the sampling distribution it estimates."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from prefmix.evaluation import intervals
from prefmix.evaluation.intervals import (
    Draw,
    cluster_bootstrap,
    cluster_bootstraps,
    nested_bootstrap,
    paired_difference,
)
from prefmix.evaluation.report import figures
from prefmix.evaluation.scoring import Predictions


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


@pytest.mark.parametrize("people", [7, 300, 3000])
def test_figures_together_have_the_intervals_they_have_alone(people: int) -> None:
    """Against draw after draw of the definition, at the same seed."""
    rng = np.random.default_rng(people)
    person = rng.integers(-1, people, size=4 * people)
    values = np.stack([rng.normal(size=len(person)), rng.integers(0, 2, len(person)), np.ones(len(person))], axis=1)
    together = cluster_bootstraps(values, person, num_resamples=150, seed=5)
    alone = [cluster_bootstrap(column, person, num_resamples=150, seed=5) for column in values.T]
    who = np.unique(np.where(person < 0, people + np.arange(len(person)), person), return_inverse=True)[1]
    sums, sizes = np.bincount(who, values[:, 0]), np.bincount(who)
    draws, rng = [], np.random.default_rng(5)
    for _ in range(150):
        counts = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)))
        draws.append(sum(counts * sums) / sum(counts * sizes))
    assert together[0].se == pytest.approx(np.std(draws, ddof=1), rel=1e-9)
    assert [together[0].low, together[0].high] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist(), rel=1e-9)
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    assert together[2][:4] == pytest.approx((1, 0, 1, 1))


def test_an_evaluation_draws_people_once() -> None:
    """Drawing is the cost: figures over the same people share one set of draws."""
    intervals._kept_draws.cache_clear()
    values = np.random.default_rng(0).normal(size=(500, 2))
    predictions = [Predictions(-np.abs(values[:, i]), values[:, 1 - i]) for i in (0, 1)]
    for each in predictions:
        figures(each, np.arange(500) // 2, np.full(500, -1), [], seed=9)
    assert intervals._kept_draws.cache_info().misses == 1


def test_memory_of_many_people_is_bounded() -> None:
    people = 120_000
    tracemalloc.start()
    cluster_bootstrap(np.arange(people, dtype=float), np.arange(people), num_resamples=400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000, "the [400, 120000] table alone would be 384 MB"


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
