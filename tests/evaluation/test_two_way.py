"""The two-way bootstrap: one seed is the cluster bootstrap, shared effects widen it, and its test keeps its level."""

from __future__ import annotations

import numpy as np
import pytest

from prefmix.evaluation.intervals import cluster_bootstrap
from prefmix.evaluation.two_way import two_way_bootstrap


def test_with_one_seed_it_is_the_bootstrap_over_people() -> None:
    rng = np.random.default_rng(0)
    person = rng.integers(30, size=400)
    value = rng.normal(size=30)[person] + rng.normal(size=400)
    found, plain = two_way_bootstrap(value, person, np.zeros(400)), cluster_bootstrap(value, person)
    assert found.mean == plain.mean and found.se == pytest.approx(plain.se, rel=0.06)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.05)


def test_what_rows_of_a_person_or_a_seed_share_widens_it() -> None:
    rng = np.random.default_rng(1)
    person, seed = (axis.ravel() for axis in np.meshgrid(np.arange(40), np.arange(6)))
    noise = rng.normal(size=240)
    of_person, of_seed = 2 * rng.normal(size=40), 2 * rng.normal(size=6)
    alone, people, seeds = (
        two_way_bootstrap(noise + effect, person, seed).se for effect in (0.0, of_person[person], of_seed[seed])
    )
    # In theory: the spread of what is shared, over the root of how many share it.
    assert people == pytest.approx(of_person.std() / np.sqrt(40), rel=0.15) and people > 2 * alone
    assert seeds == pytest.approx(of_seed.std() / np.sqrt(6), rel=0.15) and seeds > 2 * alone


def test_p_is_small_for_an_effect_and_rarely_for_none() -> None:
    rng, small = np.random.default_rng(2), 0
    person, seed = (axis.ravel() for axis in np.meshgrid(np.arange(25), np.arange(3)))
    for _ in range(60):
        value = rng.normal(size=25)[person] + rng.normal(size=75)
        small += two_way_bootstrap(value, person, seed, num_resamples=400).p < 0.05
    assert small <= 7  # 3 expected
    assert two_way_bootstrap(rng.normal(size=75) + 1.5, person, seed).p < 0.01


def test_people_without_a_name_are_people_of_their_own_and_nothing_gives_nothing() -> None:
    assert two_way_bootstrap(np.arange(5.0), np.full(5, -1), np.zeros(5)).people == 5
    assert np.isnan(two_way_bootstrap([], [], []).mean)
    assert np.isnan(two_way_bootstrap([1.0, 2.0], [0, 0], [0, 0]).p)
