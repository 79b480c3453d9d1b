"""Models one below the other, each with its interval: what beats what shows at a glance. SVG written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from prefmix.evaluation.plots import PALETTE

_ROW, _LEFT, _TOP, _WIDTH = 24, 190, 78, 460


class ForestLine(NamedTuple):
    """One model.

    Attributes:
        name: at its left.
        value: its dot.
        low, high: ends of its bar; nan: no bar.
        other: a second figure of it, a ring.
    """

    name: str
    value: float
    low: float
    high: float
    other: float


def forest_svg(title: str, x_label: str, lines: Sequence[ForestLine], names: tuple[str, str]) -> str:
    """A self-contained SVG document, readable on light and dark pages (it has its own white ground).

    Args:
        title: heading.
        x_label: label of the axis.
        lines: at least one.
        names: what dot and ring are.
    """
    numbers = np.array([[line.value, line.low, line.high, line.other] for line in lines], dtype=np.float64)
    low, high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
    pad = 0.06 * (high - low) or 0.01
    low, high = low - pad, high + pad
    height = _TOP + _ROW * len(lines) + 56

    def x_of(value: float) -> float:
        return _LEFT + _WIDTH * (value - low) / (high - low)

    bottom = _TOP + _ROW * len(lines)
    parts = [_text(16, 26, title, 16), _dot(22, 47, True), _text(34, 51, names[0]), _dot(312, 47, False)]
    parts.append(_text(324, 51, names[1]))
    for tick in np.linspace(low, high, 6):
        parts.append(f'<path d="M{x_of(tick):.1f} {_TOP - 8}V{bottom}" stroke="#e3e3e3"/>')
        parts.append(_text(x_of(tick), bottom + 18, f"{tick:.3f}", anchor="middle"))
    parts.append(_text(_LEFT + _WIDTH / 2, bottom + 40, x_label, anchor="middle"))
    for place, line in enumerate(lines):
        y = _TOP + _ROW * place + 6
        parts.append(_text(_LEFT - 12, y + 4, line.name, anchor="end"))
        if np.isfinite(line.low) and np.isfinite(line.high):
            path = f"M{x_of(line.low):.1f} {y}H{x_of(line.high):.1f}"
            parts.append(f'<path d="{path}" stroke="{PALETTE[0]}" stroke-width="2"/>')
        parts += [_dot(x_of(line.other), y, False), _dot(x_of(line.value), y, True)]
    width = _LEFT + _WIDTH + 40
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def _dot(x: float, y: float, filled: bool) -> str:
    colour, radius = (PALETTE[0], 4.5) if filled else (PALETTE[1], 5.5)
    fill = colour if filled else "none"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, content: str, size: int = 12, anchor: str = "start") -> str:
    style = f'font-family="sans-serif" font-size="{size}" fill="#222"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(content)}</text>'
