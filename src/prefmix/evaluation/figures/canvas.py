"""What every figure is drawn on: SVG whose text and lines take the colour of the page, light or dark.

Figures are 420 units wide, the width of a phone, so that text stays readable there; pages set wide screens in columns.
Colours are CSS variables with a fallback (`--x0` ... for experts): a page may have its own, and a notebook needs none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH = 420
# Okabe & Ito's palette, distinct for people with any kind of colour vision; its yellow and black only after six others.
EXPERT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00", "#666666")
GROUP_SHAPES = ("circle", "square", "diamond", "triangle", "cross", "ring")


@dataclass(frozen=True)
class Figure:
    """A picture with the numbers behind it; notebooks show it as it is.

    Attributes:
        title: what it shows.
        svg: one `<svg>` element, self-contained.
        caption: how to read it, in a sentence or two.
        header: columns of the numbers behind it; empty where the picture says all.
        rows: their cells.
    """

    title: str
    svg: str
    caption: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=tuple, repr=False)

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        return self.html()

    def html(self) -> str:
        """A `<figure>` with title, picture, caption, and the numbers behind a fold."""
        numbers = ""
        if self.rows:
            numbers = f"<details><summary>Numbers</summary>{html_table(self.header, self.rows)}</details>"
        caption = f"<p>{escape(self.caption)}</p>" if self.caption else ""
        head = f"<figcaption><h3>{escape(self.title)}</h3>{caption}</figcaption>"
        return f'<figure class="figure">{head}{self.svg}{numbers}</figure>'

    def save(self, path: str | Path) -> None:
        """Writes the picture as a file of its own."""
        Path(path).write_text(self.svg + "\n", encoding="utf-8")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table; pages make tables of kind `sortable` sort by the column that is pressed."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def expert_colour(expert: int) -> str:
    """CSS colour of an expert."""
    index = expert % len(EXPERT_COLOURS)
    return f"var(--x{index},{EXPERT_COLOURS[index]})"


def expert_name(expert: int) -> str:
    """What an expert is called everywhere."""
    return f"expert {expert}"


class Canvas:
    """SVG that grows by calls; y grows downwards.

    Args:
        title: read aloud by screen readers.
        height: units.
        width: units.
    """

    def __init__(self, title: str, height: float, width: float = WIDTH) -> None:
        self.title, self.width, self.height = title, width, height
        self._parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        anchor: str = "start",
        muted: bool = False,
        size: float = 12,
        halo: bool = False,
    ) -> None:
        """Text in the colour of the page; `halo` keeps it readable across lines."""
        style = ' opacity=".68"' if muted else ""
        if halo:
            style = ' style="paint-order:stroke;stroke:var(--paper,transparent);stroke-width:4"'
        place = f'x="{_short(x)}" y="{_short(y)}"' + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        font = f' font-size="{size:g}"' if size != 12 else ""
        self._parts.append(f"<text {place}{font}{style}>{escape(content)}</text>")

    def line(self, x1: float, y1: float, x2: float, y2: float, *, faint: bool = True, dash: bool = False) -> None:
        """A line in the colour of the page: faint for grids."""
        style = ' stroke-opacity=".16"' if faint else ' stroke-opacity=".6"'
        dashes = ' stroke-dasharray="4 4"' if dash else ""
        self._parts.append(f'<path d="M{_short(x1)} {_short(y1)}L{_short(x2)} {_short(y2)}"{style}{dashes}/>')

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, *, tip: str = "", expert: int | None = None
    ) -> None:
        """A filled rectangle."""
        place = f'x="{_short(x)}" y="{_short(y)}" width="{_short(max(width, 0))}" height="{_short(max(height, 0))}"'
        self._parts.append(f'<rect {place} style="fill:{colour}"{_marks(tip, expert)}/>')

    def path(
        self,
        points: Sequence[tuple[float, float]],
        colour: str,
        *,
        closed: bool = False,
        dash: bool = False,
        expert: int | None = None,
        tip: str = "",
    ) -> None:
        """A line through points, or the area within them (`closed`)."""
        if not points:
            return
        d = "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points) + ("Z" if closed else "")
        paint = f"fill:{colour};stroke:none" if closed else f"stroke:{colour}"
        dashes = ' stroke-dasharray="5 4"' if dash else ""
        width = "" if closed else ' stroke-width="2"'
        self._parts.append(f'<path d="{d}" style="{paint}"{width}{dashes}{_marks(tip, expert)}/>')

    def dot(
        self,
        x: float,
        y: float,
        colour: str,
        *,
        tip: str = "",
        expert: int | None = None,
        r: float = 3.5,
        shape: int = 0,
    ) -> None:
        """A point; shapes tell true groups apart."""
        kind = GROUP_SHAPES[shape % len(GROUP_SHAPES)]
        if kind in ("circle", "ring"):
            paint = f"fill:{colour}" if kind == "circle" else f"stroke:{colour};stroke-width:1.6;fill:none"
            place = f'cx="{_short(x)}" cy="{_short(y)}" r="{_short(r)}"'
            self._parts.append(f'<circle {place} style="{paint}"{_marks(tip, expert)}/>')
            return
        corners = {
            "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
            "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
            "triangle": ((0, -1.2), (1.2, 0.9), (-1.2, 0.9)),
            "cross": ((-1.2, -0.4), (-0.4, -0.4), (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4),
                      (1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4)),
        }[kind]  # fmt: skip
        self.path([(x + r * dx, y + r * dy) for dx, dy in corners], colour, closed=True, tip=tip, expert=expert)

    def legend(
        self, y: float, entries: Sequence[tuple[str, str]], left: float = 0, dashed: Sequence[str] = ()
    ) -> float:
        """Names with their colours in rows; returns the y below them.

        Args:
            y: of the first row's middle.
            entries: (name, colour).
            left: where rows begin.
            dashed: names whose lines are dashed.
        """
        x = left
        for name, colour in entries:
            width = 22 + 6.6 * len(name) + 14
            if x > left and x + width - 14 > self.width:
                x, y = left, y + 19
            if name in dashed:
                self.path([(x, y), (x + 16, y)], colour, dash=True)
            else:
                self.box(x, y - 5, 12, 10, colour)
            self.text(x + 20, y + 4, name)
            x += width
        return y + 14

    def svg(self) -> str:
        """The picture."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" role="img"'
        look = (
            f'style="width:100%;max-width:{1.35 * self.width:.0f}px;height:auto" '
            'font-family="system-ui,sans-serif" font-size="12" '
            f'fill="currentColor" stroke="none" aria-label="{escape(self.title)}"'
        )
        # Lines without a colour of their own take the page's; text has no outline.
        parts = "\n".join(
            part.replace("<path ", '<path fill="none" stroke="currentColor" ', 1) if part.startswith("<path ") else part
            for part in self._parts
        )
        return f"{head} {look}>\n{parts}\n</svg>"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2, 5, 10 ...) between two numbers, at most about `most`."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float, digits: int = 3) -> str:
    """A number as people write it; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("-", "−")


def _marks(tip: str, expert: int | None) -> str:
    tag = "" if expert is None else f' class="e e{expert}"'
    return tag + (f' data-tip="{escape(tip)}"' if tip else "")


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
