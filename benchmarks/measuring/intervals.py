"""Ratios of contenders that took turns, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A median and its 95% bootstrap interval.

    Attributes:
        median: of the values.
        low: 2.5% quantile of the bootstrapped medians.
        high: their 97.5% quantile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def median_interval(values: Sequence[float], draws: int = 2000) -> Interval:
    """Median of the values; rounds are resampled. With one value the interval is that value."""
    found = np.asarray(values, dtype=np.float64)
    index = np.random.default_rng(0).integers(0, len(found), (draws, len(found)))
    low, high = np.quantile(np.median(found[index], axis=1), [0.025, 0.975])
    return Interval(float(np.median(found)), float(low), float(high))


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median over rounds of numerator / denominator; rounds that only one of them has are left out."""
    return median_interval([a / b for a, b in zip(numerator, denominator)])
