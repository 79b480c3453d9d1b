"""Kinds of charts that figures share: lines, stacked areas, bars in rows, points with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from prefmix.evaluation.figures.canvas import WIDTH, Canvas, expert_colour, expert_name, number, ticks

LEFT, RIGHT, PLOT = 50.0, 8.0, 190.0
MOST_POINTS = 240

Points = Sequence[tuple[float, float]]


class Curve(NamedTuple):
    """A line.

    Attributes:
        name: in the legend.
        points: (x, y).
        colour: of CSS.
        dash: drawn broken.
        expert: whose line it is, if one's.
    """

    name: str
    points: Points
    colour: str
    dash: bool = False
    expert: int | None = None


class Interval(NamedTuple):
    """A point with an interval: low <= value <= high; nan: none."""

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan
    colour: str = "currentColor"
    expert: int | None = None
    tip: str = ""


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    level: tuple[str, float] | None = None,
    spaced: bool = False,
    dots: bool = False,
) -> str:
    """Lines over a common axis.

    Args:
        title: for screen readers.
        curves: at least one point among them.
        x_label: with unit.
        y_label: with unit.
        level: a horizontal line and what it means.
        spaced: x values stand at equal distances (context sizes 0, 1, 2, 4 ...).
        dots: mark every point.
    """
    curves = [curve._replace(points=thin([p for p in curve.points if math.isfinite(p[1])])) for curve in curves]
    xs = sorted({x for curve in curves for x, _ in curve.points})
    ys = [y for curve in curves for _, y in curve.points] + ([level[1]] if level else [])
    low, high = padded(min(ys), max(ys))
    canvas, top = Canvas(title, 0), 0.0
    top = canvas.legend(10, [(c.name, c.colour) for c in curves], dashed=[c.name for c in curves if c.dash]) + 18
    canvas.text(0, top - 8, y_label, muted=True)
    place = _x_axis(canvas, xs, top, x_label, spaced)
    y_of = _y_axis(canvas, low, high, top)
    if level:
        canvas.line(LEFT, y_of(level[1]), WIDTH - RIGHT, y_of(level[1]), faint=False, dash=True)
        canvas.text(WIDTH - RIGHT, y_of(level[1]) - 5, level[0], anchor="end", muted=True, halo=True)
    for curve in curves:
        points = [(place(x), y_of(y)) for x, y in sorted(curve.points)]
        canvas.path(points, curve.colour, dash=curve.dash, expert=curve.expert)
        for (x, y), (px, py) in zip(sorted(curve.points), points, strict=True):
            tip = f"{curve.name}: {number(y, 4)} at {number(x, 6)} ({x_label})"
            small = len(points) > 40 and not dots
            canvas.dot(
                px, py, "transparent" if small else curve.colour, tip=tip, expert=curve.expert, r=5 if small else 2.6
            )
    canvas.height = top + PLOT + 42
    return canvas.svg()


def stacked_areas(title: str, steps: Sequence[float], shares: Sequence[Sequence[float]], x_label: str) -> str:
    """Shares of K experts over x, stacked to one.

    Args:
        title: for screen readers.
        steps: x.
        shares: K sequences as long as `steps`.
        x_label: with unit.
    """
    keep = [round(i) for i in _even(len(steps), 80)]
    xs, kept = [steps[i] for i in keep], [[row[i] for i in keep] for row in shares]
    canvas = Canvas(title, 0)
    top = canvas.legend(10, [(expert_name(k), expert_colour(k)) for k in range(len(shares))]) + 6
    place = _x_axis(canvas, xs, top, x_label, spaced=False)
    y_of = _y_axis(canvas, 0.0, 1.0, top)
    below = [0.0] * len(xs)
    for k, row in enumerate(kept):
        above = [b + value for b, value in zip(below, row, strict=True)]
        edge = [(place(x), y_of(y)) for x, y in zip(xs, above, strict=True)]
        floor = [(place(x), y_of(y)) for x, y in zip(xs, below, strict=True)]
        tip = f"{expert_name(k)}: {row[0]:.2f} at first, {row[-1]:.2f} at the end"
        canvas.path([*edge, *reversed(floor)], expert_colour(k), closed=True, expert=k, tip=tip)
        below = above
    canvas.height = top + PLOT + 42
    return canvas.svg()


def share_rows(title: str, rows: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """One bar a row, divided among K experts.

    Args:
        title: for screen readers.
        rows: (label, note behind it, K shares that sum to one).
    """
    num_experts = len(rows[0][2])
    canvas = Canvas(title, 0)
    y = canvas.legend(10, [(expert_name(k), expert_colour(k)) for k in range(num_experts)]) + 8
    for label, note, shares in rows:
        canvas.text(0, y + 11, clipped(label, 52 - len(note)))
        canvas.text(WIDTH, y + 11, note, anchor="end", muted=True)
        x = 0.0
        for k, share in enumerate(shares):
            tip = f"{label}: {expert_name(k)} {share:.0%}"
            canvas.box(x, y + 17, share * WIDTH - 1, 12, expert_colour(k), tip=tip, expert=k)
            x += share * WIDTH
        y += 42
    canvas.height = y
    return canvas.svg()


def interval_rows(
    title: str, intervals: Sequence[Interval], x_label: str, *, level: tuple[str, float] | None = None
) -> str:
    """One row each: name above, a point with its interval below, on a common axis.

    Args:
        title: for screen readers.
        intervals: from top to bottom.
        x_label: with unit.
        level: a vertical line and what it means.
    """
    numbers = [v for i in intervals for v in (i.value, i.low, i.high) if math.isfinite(v)]
    low, high = padded(*_ends(numbers + ([level[1]] if level else [])))
    canvas, top = Canvas(title, 0), 20.0 if level else 6.0

    def x_of(value: float) -> float:
        return 6 + (WIDTH - 12) * (value - low) / (high - low)

    bottom = top + 40 * len(intervals)
    marks = ticks(low, high)
    for tick in marks:
        canvas.text(x_of(tick), bottom + 16, number(tick), anchor="middle", muted=True)
    if level:
        near = x_of(level[1])
        canvas.text(near, 12, level[0], anchor="end" if near > 300 else "start" if near < 120 else "middle", muted=True)
    for row, entry in enumerate(intervals):
        y = top + 40 * row
        for tick in marks:  # lines stop where words begin
            canvas.line(x_of(tick), y + 20, x_of(tick), y + 34)
        if level:
            canvas.line(x_of(level[1]), y + 18, x_of(level[1]), y + 36, faint=False)
        canvas.text(2, y + 14, entry.name)
        value = number(entry.value)
        canvas.text(WIDTH - 2, y + 14, value, anchor="end")
        if math.isfinite(entry.low) and math.isfinite(entry.high):
            ends = [(x_of(entry.low), y + 27), (x_of(entry.high), y + 27)]
            canvas.path(ends, entry.colour, expert=entry.expert)
        tip = entry.tip or f"{entry.name}: {value}{_between(entry)}"
        if math.isfinite(entry.value):
            canvas.dot(x_of(entry.value), y + 27, entry.colour, tip=tip, expert=entry.expert, r=5)
    canvas.text(WIDTH / 2, bottom + 34, x_label, anchor="middle", muted=True)
    canvas.height = bottom + 40
    return canvas.svg()


def thin(points: Points) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` of the points, the first and the last among them."""
    return [points[round(i)] for i in _even(len(points), MOST_POINTS)]


def padded(low: float, high: float) -> tuple[float, float]:
    """A little wider than the range, and never empty."""
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - pad, high + pad


def clipped(text: str, most: int) -> str:
    """One line of at most `most` letters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: max(most - 1, 1)].rstrip() + "…"


def table_of(curves: Mapping[str, Points], x_name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of curves as numbers, thinned to 40 rows."""
    xs = sorted({x for points in curves.values() for x, _ in points})
    xs = [xs[round(i)] for i in _even(len(xs), 40)]
    found = {name: dict(points) for name, points in curves.items()}
    rows = [[number(x, 6), *(number(found[name].get(x, math.nan), 4) for name in curves)] for x in xs]
    return [x_name, *curves], rows


def _even(count: int, most: int) -> list[float]:
    if count <= most:
        return [float(i) for i in range(count)]
    return [i * (count - 1) / (most - 1) for i in range(most)]


def _ends(numbers: Sequence[float]) -> tuple[float, float]:
    return min(numbers), max(numbers)


def _between(entry: Interval) -> str:
    return f" [{number(entry.low)}, {number(entry.high)}]" if math.isfinite(entry.low) else ""


def _x_axis(canvas: Canvas, xs: Sequence[float], top: float, label: str, spaced: bool) -> Callable[[float], float]:
    right, bottom = WIDTH - RIGHT, top + PLOT
    low, high = (xs[0], xs[-1]) if len(xs) > 1 else (xs[0] - 1, xs[0] + 1)

    def place(x: float) -> float:
        share = (xs.index(x) + 0.5) / len(xs) if spaced else (x - low) / (high - low)
        return LEFT + (right - LEFT) * share

    marks = list(xs) if spaced else ticks(low, high, 5) if len(xs) > 1 else list(xs)
    for tick in marks:
        anchor = "middle" if place(tick) < right - 12 else "end"
        canvas.text(place(tick), bottom + 17, number(tick, 6), anchor=anchor, muted=True)
    canvas.text((LEFT + right) / 2, bottom + 36, label, anchor="middle", muted=True)
    return place


def _y_axis(canvas: Canvas, low: float, high: float, top: float) -> Callable[[float], float]:
    def y_of(y: float) -> float:
        return top + PLOT * (high - y) / (high - low)

    for tick in ticks(low, high, 5):
        canvas.line(LEFT, y_of(tick), WIDTH - RIGHT, y_of(tick))
        canvas.text(LEFT - 7, y_of(tick) + 4, number(tick), anchor="end", muted=True)
    return y_of
