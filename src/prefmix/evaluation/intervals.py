"""Intervals for means over comparisons that come in clusters: one person's judgements are not independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


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
    values_B, cluster_B = np.asarray(values, dtype=np.float64), np.asarray(cluster).astype(np.int64)
    if len(values_B) == 0:
        nan = float("nan")
        return Estimate(nan, nan, nan, nan, 0, 0)
    anonymous = cluster_B < 0
    cluster_B = np.where(anonymous, cluster_B.max(initial=-1) + 1 + np.arange(len(cluster_B)), cluster_B)
    index = np.unique(cluster_B, return_inverse=True)[1]
    sums, sizes = np.bincount(index, values_B), np.bincount(index).astype(np.float64)
    mean, num_clusters = float(values_B.mean()), len(sizes)
    if num_clusters < 2:
        return Estimate(mean, float("nan"), float("nan"), float("nan"), len(values_B), num_clusters)
    draws = _resampled_means(sums, sizes, num_resamples, np.random.default_rng(seed))
    tail = 0.5 * (1.0 - level)
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return Estimate(mean, float(draws.std(ddof=1)), float(low), float(high), len(values_B), num_clusters)


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


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    # Draws go in slices so that thousands of people do not need a [resamples, people] table at once.
    means, slice_size = [], max(1, 2_000_000 // len(sizes))
    for start in range(0, num_resamples, slice_size):
        draws = min(slice_size, num_resamples - start)
        counts = rng.multinomial(len(sizes), np.full(len(sizes), 1.0 / len(sizes)), size=draws)
        means.append((counts @ sums) / (counts @ sizes))
    return np.concatenate(means)


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
