"""Means, intervals and tests over people and seeds.

A person stands in several seeds' test rows, and a seed's fit scores all people, so both are drawn anew, crossed: a
resample draws seeds and, independently, people, and takes all their rows under the seeds drawn.

Legend: S seeds, U people, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Sums(NamedTuple):
    """Per seed and person: [S, U] sums over rows, and how many rows; 0 where a person was not scored under a seed."""

    total: np.ndarray
    count: np.ndarray

    @property
    def mean(self) -> float:
        """Over rows."""
        return float(self.total.sum() / self.count.sum())


class Interval(NamedTuple):
    """A mean with its 95% interval over people and seeds, and how sure its sign is.

    Attributes:
        mean: over rows.
        low, high: percentiles of the crossed bootstrap.
        p_bootstrap: two-sided, twice the smaller share of resamples beyond zero; at least 1 / R.
        p_signs: two-sided, from turning every person's summed difference round at random: people alone. Only a
            difference has one.
    """

    mean: float
    low: float
    high: float
    p_bootstrap: float
    p_signs: float


def collect(cells: Sequence[tuple[Sequence[str], np.ndarray, np.ndarray]]) -> Sums:
    """Sums by seed and person of cells (names, person of each row, value of each row), people matched by name."""
    people = sorted({name for names, _, _ in cells for name in names})
    place = {name: index for index, name in enumerate(people)}
    total, count = np.zeros((len(cells), len(people))), np.zeros((len(cells), len(people)))
    for seed, (names, user, value) in enumerate(cells):
        columns = np.array([place[name] for name in names], dtype=int)[user]
        np.add.at(total[seed], columns, value)
        np.add.at(count[seed], columns, 1.0)
    return Sums(total, count)


def interval(sums: Sums, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of rows, its interval and p-values; of a difference, pass sums of differences.

    Source: Owen 2007 (The pigeonhole bootstrap) for crossed resampling; it is conservative.
    """
    rng = np.random.default_rng(seed)
    seeds, people = sums.total.shape
    means = []
    for start in range(0, resamples, 500):
        draws = min(500, resamples - start)
        of_person = rng.multinomial(people, np.full(people, 1.0 / people), size=draws)
        of_seed = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=draws)
        above, below = (np.einsum("rs,rs->r", of_person @ part.T, of_seed) for part in sums)
        means.append(above / below)
    drawn = np.concatenate(means)
    low, high = np.quantile(drawn, [0.025, 0.975])
    beyond = min((drawn >= 0).mean(), (drawn <= 0).mean())
    p = max(2.0 * beyond, 1.0 / resamples)
    return Interval(sums.mean, float(low), float(high), float(min(p, 1.0)), sign_test(sums, resamples, rng))


def sign_test(sums: Sums, flips: int, rng: np.random.Generator) -> float:
    """P-value of "no person's differences have a preferred sign", two-sided, people as units."""
    by_person = sums.total.sum(axis=0)
    by_person = by_person[sums.count.sum(axis=0) > 0]
    seen, beyond = abs(by_person.sum()), 1
    for start in range(0, flips, 500):
        signs = rng.integers(0, 2, size=(min(500, flips - start), len(by_person))) * 2 - 1
        beyond += int((np.abs(signs @ by_person) >= seen - 1e-12).sum())
    return beyond / (flips + 1)
