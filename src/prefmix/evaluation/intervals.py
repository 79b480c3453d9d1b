"""Intervals for means over comparisons that come in clusters: one person's judgements are not independent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Draws that are kept, at most (two sets): those of 20,000 people.
_KEPT_BYTES = 40_000_000


class Estimate(NamedTuple):
    """A mean with its uncertainty over the sampling of people.

    Attributes:
        mean: mean over comparisons.
        se: bootstrap standard error; nan with fewer than two clusters.
        low, high: percentile interval.
        num_rows: number of comparisons.
        clusters: number of clusters (people).
    """

    mean: float
    se: float
    low: float
    high: float
    num_rows: int
    clusters: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def cluster_bootstrap(
    values: ArrayLike, cluster: ArrayLike, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of `values` with a percentile interval from resampling whole clusters with replacement.

    A resample that draws cluster c n_c times has mean sum_c n_c S_c / sum_c n_c N_c (S_c the sum, N_c the size), so
    people with many judgements weigh as much as they do in the mean itself.

    Args:
        values: [B] one number a comparison (a hit, a log-loss, a difference of two models' hits).
        cluster: [B] cluster of each comparison; rows with -1 are clusters of their own.
        level: coverage of the interval.
        num_resamples: bootstrap draws.
        seed: of the draws.

    Source: Cameron, Gelbach & Miller 2008, the pairs cluster bootstrap.
    Relations: it covers the choice of people, not the choice of texts that all of them judge.
    """
    columns = np.asarray(values, dtype=np.float64)[:, None]
    return cluster_bootstraps(columns, cluster, level=level, num_resamples=num_resamples, seed=seed)[0]


def cluster_bootstraps(
    values: ArrayLike, cluster: ArrayLike, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> list[Estimate]:
    """`cluster_bootstrap` of each of M figures of the same comparisons, from one set of draws.

    Args:
        values: [B, M] M numbers a comparison.
        cluster: [B] as there.
        level: as there.
        num_resamples: as there.
        seed: as there; a figure's interval is the one that it gets alone.
    """
    values_BM, cluster_B = np.asarray(values, dtype=np.float64), np.asarray(cluster).astype(np.int64)
    nan, num_rows = float("nan"), len(values_BM)
    if num_rows == 0:
        return [Estimate(nan, nan, nan, nan, 0, 0)] * values_BM.shape[1]
    anonymous = cluster_B < 0
    cluster_B = np.where(anonymous, cluster_B.max(initial=-1) + 1 + np.arange(num_rows), cluster_B)
    index = np.unique(cluster_B, return_inverse=True)[1]
    sums = np.stack([np.bincount(index, column) for column in values_BM.T], axis=1)
    sizes, means = np.bincount(index).astype(np.float64), values_BM.mean(axis=0)
    if len(sizes) < 2:
        return [Estimate(float(mean), nan, nan, nan, num_rows, len(sizes)) for mean in means]
    draws = _resampled_means(sums, sizes, num_resamples, seed)
    tail = 0.5 * (1.0 - level)
    low, high = np.quantile(draws, [tail, 1.0 - tail], axis=0)
    columns = zip(means.tolist(), draws.std(axis=0, ddof=1).tolist(), low.tolist(), high.tolist(), strict=True)
    return [Estimate(*column, num_rows, len(sizes)) for column in columns]


def paired_difference(
    first: ArrayLike, second: ArrayLike, cluster: ArrayLike, *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """`cluster_bootstrap` of first - second on the same comparisons: texts and people are shared, so they cancel.

    Args:
        first: [B] figures of one model.
        second: [B] figures of the other model on the same comparisons.
        cluster: [B] person of each comparison.
        level: coverage.
        seed: of the draws.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return cluster_bootstrap(difference, cluster, level=level, seed=seed)


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """[draws, M] means: a matrix of how often each cluster was drawn, times sums [C, M] and sizes [C]."""
    columns, means = np.column_stack([sums, sizes]), []
    for counts in _draws(len(sizes), num_resamples, seed):
        totals = counts.astype(np.float64) @ columns
        means.append(totals[:, :-1] / totals[:, -1:])
    return np.concatenate(means)


def _draws(num_clusters: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """[slice, C] counts of each cluster in each draw, in slices; the last few sets are kept where they are small."""
    if num_clusters * num_resamples > _KEPT_BYTES:
        yield from _drawn(num_clusters, num_resamples, seed)
        return
    counts, rows = _kept_draws(num_clusters, num_resamples, seed), _rows_at_once(num_clusters)
    for start in range(0, num_resamples, rows):
        yield counts[start : start + rows]


@functools.lru_cache(maxsize=2)
def _kept_draws(num_clusters: int, num_resamples: int, seed: int) -> np.ndarray:
    """All draws, one byte a count: the figures of an evaluation are over the same people and share them."""
    return np.concatenate([_as_bytes(counts) for counts in _drawn(num_clusters, num_resamples, seed)])


def _drawn(num_clusters: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng, rows = np.random.default_rng(seed), _rows_at_once(num_clusters)
    for start in range(0, num_resamples, rows):
        size = min(rows, num_resamples - start)
        yield rng.multinomial(num_clusters, np.full(num_clusters, 1.0 / num_clusters), size=size)


def _rows_at_once(num_clusters: int) -> int:
    return max(1, 2_000_000 // num_clusters)


def _as_bytes(counts: np.ndarray) -> np.ndarray:
    # Of C people drawn C times, one comes 256 times with a probability below 1e-500 (fewer than 256 people: never).
    assert counts.max() < 256, "a byte does not hold these counts"
    return counts.astype(np.uint8)


class Draw(NamedTuple):
    """One group of a bootstrap draw: its index, and which of its members were drawn."""

    group: int
    members: np.ndarray


class Interval(NamedTuple):
    """A figure that is no mean, with a percentile interval.

    Attributes:
        value: on what was seen.
        low, high: percentile interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def nested_bootstrap(
    statistic: Callable[[Sequence[Draw]], Sequence[float] | np.ndarray],
    sizes: Sequence[int],
    *,
    level: float = 0.95,
    num_resamples: int = 500,
    seed: int = 0,
) -> list[Interval]:
    """Intervals of figures over groups and their members: groups (seeds) are drawn with replacement, then members.

    Args:
        statistic: from drawn groups and members to one number or several.
        sizes: members of each group.
        level: coverage.
        num_resamples: bootstrap draws.
        seed: of the draws.

    Relations: with few groups the interval over them is rough: three seeds can be drawn in ten ways.
    """
    rng, draws = np.random.default_rng(seed), []
    seen = statistic([Draw(group, np.arange(size)) for group, size in enumerate(sizes)])
    for _ in range(num_resamples):
        groups = rng.integers(len(sizes), size=len(sizes))
        draws.append(statistic([Draw(int(g), rng.integers(sizes[g], size=sizes[g])) for g in groups]))
    tail = 0.5 * (1.0 - level)
    low, high = np.quantile(np.asarray(draws, dtype=np.float64), [tail, 1.0 - tail], axis=0)
    return [Interval(float(v), float(a), float(b)) for v, a, b in zip(seen, low, high, strict=True)]
