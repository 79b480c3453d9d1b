"""Temperature schedules of the E-steps."""

from __future__ import annotations


def temperature(step_fraction: float, start: float, end: float) -> float:
    """Geometric path from `start` to `end`: start^(1-f) end^f.

    Equal ratios, because temperatures act by dividing logits: from 4 to 2 is as far as from 2 to 1.

    Args:
        step_fraction: f, share of training done; clipped to [0, 1].
        start: temperature at f = 0, positive.
        end: temperature at f = 1, positive.
    """
    fraction = min(max(step_fraction, 0.0), 1.0)
    return float(start ** (1.0 - fraction) * end**fraction)
