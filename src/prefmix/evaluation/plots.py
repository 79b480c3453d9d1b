"""Small pictures of learned groups and curves: SVG written by hand, and text for a terminal.

Legend: U users, K experts, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

# Okabe & Ito's palette: distinct for people with any kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
GLYPHS = "●○▲△■□◆◇"
# True groups get colours that no expert has: which expert belongs to which group is for the eye to find.
TRUTH_PALETTE = PALETTE[4:] + PALETTE[:4]
_TEXT = 'font-family="sans-serif" font-size="12" fill="#222"'


def user_order(resp: np.ndarray) -> np.ndarray:
    """Users sorted by most probable expert, the surest first within an expert. Args: resp [U, K]."""
    return np.lexsort((-resp.max(axis=1), resp.argmax(axis=1)))


def group_map_svg(
    title: str,
    resp: np.ndarray,
    choices: np.ndarray,
    columns: Sequence[str],
    truth: Sequence[int] | None = None,
    truth_names: Sequence[str] = (),
) -> str:
    """A map of people: one row each, sorted by learned expert; what they chose, the expert they got, the true group.

    Args:
        title: heading.
        resp: [U, K] posterior of each user.
        choices: [U, C] share of a user's choices that went to the first side of column c, in [0, 1]; nan: none.
        columns: C names.
        truth: [U] true groups (drawn beside, never used for sorting), or None.
        truth_names: names of the true groups.

    Returns:
        A self-contained SVG document.
    """
    users, num_columns = choices.shape
    cell_width, cell_height, left, top = 34, max(4, min(12, 480 // max(users, 1))), 120, 175
    strip = left + num_columns * cell_width + 16
    parts = [_text(16, 26, title, size=16)]
    for column, name in enumerate(columns):
        x = left + column * cell_width + cell_width / 2
        parts.append(_text(x, top - 8, name, rotate=-40))
    parts += [_text(strip + 8, top - 8, "learned", rotate=-40)]
    if truth is not None:
        parts.append(_text(strip + 34, top - 8, "true", rotate=-40))
    for row, user in enumerate(user_order(resp)):
        y = top + row * cell_height
        for column in range(num_columns):
            colour = _diverging(choices[user, column])
            parts.append(_box(left + column * cell_width, y, cell_width - 1, cell_height - 0.5, colour))
        parts += _stacked(resp[user], strip, y, 20, cell_height - 0.5)
        if truth is not None:
            parts.append(_box(strip + 26, y, 16, cell_height - 0.5, TRUTH_PALETTE[truth[user] % len(PALETTE)]))
    bottom = top + users * cell_height
    parts += _expert_brackets(resp, left, top, cell_height)
    parts += _key(bottom + 18, left, truth_names if truth is not None else ())
    return _document(max(strip + 190, 560), bottom + 64 + 18 * len(truth_names), parts)


def curve_svg(title: str, x_label: str, y_label: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines through points, evenly spaced in the order of their x values.

    Args:
        title: heading.
        x_label: label of the horizontal axis, with unit.
        y_label: label of the vertical axis, with unit.
        curves: name -> (x, y) points.

    Returns:
        A self-contained SVG document.
    """
    xs = sorted({x for points in curves.values() for x, _ in points})
    ys = [y for points in curves.values() for _, y in points if np.isfinite(y)]
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    pad = 0.1 * (high - low) or 0.01
    low, high = low - pad, high + pad
    left, top, width, height = 70, 50, 420, 240
    place = {x: left + width * (i + 0.5) / len(xs) for i, x in enumerate(xs)}
    parts = [_text(16, 26, title, size=16), _text(left, top - 8, y_label)]
    for tick in np.linspace(low, high, 5):
        y = top + height * (high - tick) / (high - low)
        parts += [_line(left, y, left + width, y, "#ddd"), _text(left - 8, y + 4, f"{tick:.3f}", anchor="end")]
    parts += [_text(place[x], top + height + 18, f"{x:g}", anchor="middle") for x in xs]
    parts.append(_text(left + width / 2, top + height + 40, x_label, anchor="middle"))
    for index, (name, points) in enumerate(curves.items()):
        colour = PALETTE[index % len(PALETTE)]
        dots = [(place[x], top + height * (high - y) / (high - low)) for x, y in sorted(points) if np.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in dots]
        parts += [_box(left + width + 20, top + 20 * index, 12, 12, colour)]
        parts.append(_text(left + width + 38, top + 20 * index + 11, name))
    return _document(left + width + 260, top + height + 60, parts)


class ScatterPoint(NamedTuple):
    """One point of `scatter_svg`.

    Attributes:
        series: points of one series share a colour and are joined in the order of x.
        label: written beside the point; may be empty.
        x: position, positive.
        y: height.
        low, high: ends of its bar.
    """

    series: str
    label: str
    x: float
    y: float
    low: float
    high: float


def scatter_svg(
    title: str, x_label: str, y_label: str, points: Sequence[ScatterPoint], *, logarithmic: bool = True
) -> str:
    """Points with bars, by default over a logarithmic axis, for what costs from seconds to hours.

    Args:
        title: heading.
        x_label: label of the horizontal axis, with unit.
        y_label: label of the vertical axis, with unit.
        points: at least one.
        logarithmic: of the horizontal axis; then positions must be positive.

    Returns:
        A self-contained SVG document.
    """
    left, top, width, height = 70, 60, 560, 340
    place = np.log if logarithmic else np.asarray
    x_low, x_high, x_ticks = _horizontal([point.x for point in points], logarithmic)
    y_low, y_high = min(point.low for point in points), max(point.high for point in points)
    pad = 0.05 * (y_high - y_low) or 0.01
    y_low, y_high = y_low - pad, y_high + pad

    def x_of(x: float) -> float:
        return left + width * float((place(x) - place(x_low)) / (place(x_high) - place(x_low)))

    def y_of(y: float) -> float:
        return top + height * (y_high - y) / (y_high - y_low)

    parts = [_text(16, 26, title, size=16), _text(left, top - 8, y_label)]
    for tick in np.linspace(y_low, y_high, 6):
        parts += [_line(left, y_of(tick), left + width, y_of(tick), "#ddd")]
        parts += [_text(left - 8, y_of(tick) + 4, f"{tick:.3f}", anchor="end")]
    for tick in x_ticks:
        parts += [_line(x_of(tick), top, x_of(tick), top + height, "#eee")]
        parts += [_text(x_of(tick), top + height + 18, f"{tick:.3g}", anchor="middle")]
    parts.append(_text(left + width / 2, top + height + 40, x_label, anchor="middle"))
    for index, series in enumerate(dict.fromkeys(point.series for point in points)):
        colour = PALETTE[index % len(PALETTE)]
        own = sorted((point for point in points if point.series == series), key=lambda point: point.x)
        path = " ".join(f"{x_of(point.x):.1f},{y_of(point.y):.1f}" for point in own)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
        for point in own:
            x, y = x_of(point.x), y_of(point.y)
            parts.append(_line(x, y_of(point.low), x, y_of(point.high), colour, 0.7))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
            parts.append(_text(x + 7, y - 5, point.label))
        parts += [_box(left + width + 20, top + 20 * index, 12, 12, colour)]
        parts.append(_text(left + width + 38, top + 20 * index + 11, series))
    return _document(left + width + 220, top + height + 60, parts)


def _horizontal(xs: Sequence[float], logarithmic: bool) -> tuple[float, float, list[float]]:
    """Ends of the axis and where it is marked."""
    if logarithmic:
        low, high = min(xs) / 1.3, max(xs) * 1.3
        return low, high, _log_ticks(low, high)
    pad = 0.05 * (max(xs) - min(xs)) or 0.01
    return min(xs) - pad, max(xs) + pad, np.linspace(min(xs), max(xs), 5).tolist()


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 ... between two positive numbers."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high]


def group_map_text(resp: np.ndarray, truth: Sequence[int] | None = None, width: int = 60) -> str:
    """The same map for a terminal: one line or more for each expert, one glyph for each person.

    Args:
        resp: [U, K] posterior of each user.
        truth: [U] true groups, which choose the glyph; None draws everyone alike.
        width: glyphs in a line.
    """
    hard, lines = resp.argmax(axis=1), []
    kind = np.zeros(len(resp), dtype=int) if truth is None else np.asarray(truth)
    for expert in range(resp.shape[1]):
        members = np.flatnonzero(hard == expert)
        glyphs = "".join(GLYPHS[k % len(GLYPHS)] for k in np.sort(kind[members]))
        for start in range(0, max(len(glyphs), 1), width):
            label = f"expert {expert} ({len(members):3d} people)" if start == 0 else ""
            lines.append(f"  {label:22s} {glyphs[start : start + width]}".rstrip())
    return "\n".join(lines)


def _expert_brackets(resp: np.ndarray, left: float, top: float, cell_height: float) -> list[str]:
    hard, parts, row = resp.argmax(axis=1), [], 0
    for expert in range(resp.shape[1]):
        size = int((hard == expert).sum())
        if size:
            y, end = top + row * cell_height, top + (row + size) * cell_height
            parts.append(_line(left - 6, y + 1, left - 6, end - 1, PALETTE[expert % len(PALETTE)], 4))
            parts.append(_text(left - 14, (y + end) / 2 + 4, f"expert {expert} ({size})", anchor="end"))
        row += size
    return parts


def _key(y: float, left: float, truth_names: Sequence[str]) -> list[str]:
    parts = [_text(left, y + 11, "chose the first side:")]
    for step, share in enumerate((0.0, 0.5, 1.0)):
        parts.append(_box(left + 130 + 62 * step, y, 14, 14, _diverging(share)))
        parts.append(_text(left + 148 + 62 * step, y + 11, ("never", "half", "always")[step]))
    for index, name in enumerate(truth_names):
        parts.append(_box(left, y + 24 + 18 * index, 14, 14, TRUTH_PALETTE[index % len(PALETTE)]))
        parts.append(_text(left + 22, y + 35 + 18 * index, f"true group: {name}"))
    return parts


def _stacked(shares: np.ndarray, x: float, y: float, width: float, height: float) -> list[str]:
    ends = np.concatenate([[0.0], np.cumsum(shares)]) * width
    return [
        _box(x + ends[k], y, ends[k + 1] - ends[k], height, PALETTE[k % len(PALETTE)])
        for k in range(len(shares))
        if ends[k + 1] - ends[k] > 0.05
    ]


def _diverging(share: float) -> str:
    if not np.isfinite(share):
        return "#eeeeee"
    low, middle, high = np.array([178, 24, 43]), np.array([247, 247, 247]), np.array([33, 102, 172])
    mix = middle + (high - middle) * (2 * share - 1) if share >= 0.5 else middle + (low - middle) * (1 - 2 * share)
    return "#" + "".join(f"{int(round(channel)):02x}" for channel in mix)


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" stroke-width="{width:g}"/>'


def _text(x: float, y: float, content: str, *, size: int = 12, anchor: str = "start", rotate: float = 0) -> str:
    turn = f' transform="rotate({rotate:g} {x:.1f} {y:.1f})"' if rotate else ""
    style = _TEXT.replace('"12"', f'"{size}"')
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}{turn}>{escape(content)}</text>'


def _document(width: float, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', *parts])
    return f'{head} height="{height:.0f}">\n{body}\n</svg>\n'
