"""Several rewards at once: which points no other beats, and how much they dominate.

Legend: N points, R rewards.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def non_dominated(points: Float[np.ndarray, "N R"]) -> Bool[np.ndarray, "N"]:
    """[N] whether no other point is at least as good in every reward and better in one."""
    at_least = (points[:, None] >= points[None]).all(axis=2)
    better = (points[:, None] > points[None]).any(axis=2)
    return np.asarray(~(at_least & better).any(axis=0))


def hypervolume(points: Float[np.ndarray, "N R"], corner: Float[np.ndarray, "R"]) -> float:
    """Volume of the union of the boxes between `corner` and each point, larger rewards being better.

    Points that are not above the corner in every reward add nothing. By slices along the last reward: between two
    neighbouring heights the cross-section is the hypervolume of the points above, in one dimension less.

    Args:
        points: [N, R].
        corner: [R] the worst that counts; the figure depends on it, so report it.

    Source: Zitzler & Thiele 1999; While et al. 2006 (slicing objectives).
    """
    inside = points[(points > corner).all(axis=1)]
    if not len(inside):
        return 0.0
    return _volume(np.unique(inside[non_dominated(inside)], axis=0) - corner)


def _volume(points: Float[np.ndarray, "N R"]) -> float:
    if points.shape[1] == 1:
        return float(points.max())
    points = points[np.argsort(-points[:, -1], kind="stable")]
    if points.shape[1] == 2:
        # From the highest down: each step of height is as wide as the widest point so far.
        heights = np.append(points[:, 1], 0.0)
        return float((np.maximum.accumulate(points[:, 0]) * (heights[:-1] - heights[1:])).sum())
    heights = np.append(points[:, -1], 0.0)
    thick = heights[:-1] - heights[1:]
    return sum(float(thick[i]) * _volume(points[: i + 1, :-1]) for i in np.flatnonzero(thick > 0))


def simplex_grid(num: int, steps: int) -> Float[np.ndarray, "N R"]:
    """All weight vectors of `num` entries that are multiples of 1 / steps and sum to 1; the corners come in."""
    if num == 1:
        return np.ones((1, 1))
    rows = [
        np.concatenate([[first / steps], rest * (steps - first) / steps])
        for first in range(steps + 1)
        for rest in (simplex_grid(num - 1, steps - first) if first < steps else np.zeros((1, num - 1)))
    ]
    return np.array(rows)
