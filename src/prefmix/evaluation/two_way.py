"""Intervals and tests over people and seeds at once: both are samples, and neither's rows are independent.

Legend: B rows, P people, S seeds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class TwoWay(NamedTuple):
    """A mean with its uncertainty over people and seeds.

    Attributes:
        mean: over rows.
        se: standard error.
        low, high: percentile interval.
        p: two-sided, of a mean of 0; never below 1 / (resamples + 1).
        people: P.
        seeds: S.
    """

    mean: float
    se: float
    low: float
    high: float
    p: float
    people: int
    seeds: int


def two_way_bootstrap(
    values: ArrayLike,
    person: ArrayLike,
    seed: ArrayLike,
    *,
    level: float = 0.95,
    num_resamples: int = 4000,
    rng_seed: int = 0,
) -> TwoWay:
    """Mean of `values` with people and seeds resampled, each with replacement and apart from the other.

    A draw in which person p comes n_p times and seed s m_s times has mean sum n_p m_s V_ps / sum n_p m_s N_ps (V sums,
    N counts of rows). It errs on the wide side. With one seed only people are resampled, and nothing is said about
    other seeds; with two, their spread is known badly.

    Args:
        values: [B] one number a row (a hit, a log-loss, a difference of two arms).
        person: [B] who judged; -1: a person of their own.
        seed: [B] which run the row belongs to.
        level: coverage.
        num_resamples: draws.
        rng_seed: of the draws.

    Source: Owen 2007 (arXiv 0712.1111), the pigeonhole bootstrap.
    """
    value, who = np.asarray(values, dtype=np.float64), np.asarray(person).astype(np.int64)
    if len(value) == 0:
        nan = float("nan")
        return TwoWay(nan, nan, nan, nan, nan, 0, 0)
    who = np.where(who < 0, who.max(initial=-1) + 1 + np.arange(len(who)), who)
    people, p = np.unique(who, return_inverse=True)
    seeds, s = np.unique(np.asarray(seed), return_inverse=True)
    place, shape = p * len(seeds) + s, (len(people), len(seeds))
    sums = np.bincount(place, value, shape[0] * shape[1]).reshape(shape)
    sizes = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
    rng = np.random.default_rng(rng_seed)
    draws = []
    for start in range(0, num_resamples, 500):
        count = min(500, num_resamples - start)
        n = rng.multinomial(shape[0], np.full(shape[0], 1 / shape[0]), size=count)
        m = rng.multinomial(shape[1], np.full(shape[1], 1 / shape[1]), size=count)
        total = ((n @ sizes) * m).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws.append(((n @ sums) * m).sum(axis=1) / total)
    mean, found = float(value.mean()), np.concatenate(draws)
    found = found[np.isfinite(found)]
    if len(people) < 2 or len(found) == 0:
        nan = float("nan")
        return TwoWay(mean, nan, nan, nan, nan, len(people), len(seeds))
    tail = 0.5 * (1.0 - level)
    low, high = np.quantile(found, [tail, 1.0 - tail])
    side = min((found <= 0).sum(), (found >= 0).sum())
    p_value = min(1.0, 2 * (int(side) + 1) / (len(found) + 1))
    return TwoWay(mean, float(found.std(ddof=1)), float(low), float(high), p_value, len(people), len(seeds))
