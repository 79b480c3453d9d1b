"""What the experts became: rewards, distance from the reference, displacement, length. Legend: B rows, K experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prefmix.evaluation.figures.canvas import WIDTH, Canvas, Figure, expert_colour, expert_name, number
from prefmix.evaluation.figures.charts import Interval, interval_rows, padded, ticks


class ExpertRows(NamedTuple):
    """Held-out rows under every expert.

    Attributes:
        rewards_chosen, rewards_rejected: [B, K] implicit rewards, nats.
        shift_chosen, shift_rejected: [B, K] log pi_k - log pi_ref of the response, nats a token.
        weights: [B, K] weights used for the row's user.
        length_difference: [B] log tokens of the chosen response less those of the rejected one.
        cluster: [B] the person, -1 where unknown.
    """

    rewards_chosen: np.ndarray
    rewards_rejected: np.ndarray
    shift_chosen: np.ndarray
    shift_rejected: np.ndarray
    weights: np.ndarray
    length_difference: np.ndarray
    cluster: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """[B, K] m_k."""
        return self.rewards_chosen - self.rewards_rejected


class Divergence(NamedTuple):
    """Distance of one expert from the reference over responses that it wrote.

    Attributes:
        mean: of log pi_k(y) - log pi_ref(y), y drawn from pi_k: an unbiased estimate of KL(pi_k || pi_ref), nats.
        error: its standard error.
        responses: how many.
        tokens: their mean length.
    """

    mean: float
    error: float
    responses: int
    tokens: float


def expert_rewards(rows: ExpertRows) -> Figure:
    """Margins of each expert on the rows of its own people (solid) and of everybody else's (pale): quartiles and tails.

    Rows belong to the expert with the largest weight.
    """
    num_experts, own = rows.margins.shape[1], rows.weights.argmax(axis=1)
    whisker = np.quantile(rows.margins, [0.02, 0.98])
    low, high = padded(float(min(whisker[0], 0)), float(max(whisker[1], 0)))
    canvas, cells = Canvas("Implicit-reward margins by expert", 0), []

    def x_of(value: float) -> float:
        return 4 + (WIDTH - 8) * (min(max(value, low), high) - low) / (high - low)

    bottom = 8 + 62.0 * num_experts
    for tick in ticks(low, high):
        canvas.line(x_of(tick), 4, x_of(tick), bottom)
        canvas.text(x_of(tick), bottom + 16, number(tick), anchor="middle", muted=True)
    canvas.line(x_of(0), 4, x_of(0), bottom, faint=False, dash=True)
    for k in range(num_experts):
        y = 8 + 62 * k
        canvas.text(2, y + 13, expert_name(k))
        for part, (name, chosen) in enumerate((("own rows", own == k), ("others' rows", own != k))):
            margins = rows.margins[chosen, k]
            cells.append([expert_name(k), name, *_summary(margins)])
            if len(margins):
                _box(canvas, x_of, margins, y + 20 + 16 * part, k, name, pale=bool(part))
    canvas.text(
        WIDTH / 2,
        bottom + 34,
        "margin, nats: right of 0 the expert agrees with the person",
        anchor="middle",
        muted=True,
    )
    canvas.height = bottom + 42
    caption = "Boxes are quartiles, lines 5% to 95%. Solid: rows of the expert's own people; pale: everybody else's."
    header = ["", "rows", "count", "mean margin, nats", "agrees"]
    return Figure("Implicit rewards", canvas.svg(), caption, header, cells)


def expert_displacement(rows: ExpertRows) -> Figure:
    """How far the experts moved chosen and rejected responses of their own people from the reference, nats a token."""
    title, points, own = "Displacement", [], rows.weights.argmax(axis=1)
    for k in range(rows.weights.shape[1]):
        for name, shift in (("chosen", rows.shift_chosen), ("rejected", rows.shift_rejected)):
            mean, error = _mean(shift[own == k, k])
            colour = expert_colour(k) if name == "chosen" else f"color-mix(in srgb,{expert_colour(k)} 55%,currentColor)"
            points.append(
                Interval(f"{expert_name(k)}, {name} responses", mean, mean - 2 * error, mean + 2 * error, colour, k)
            )
    svg = interval_rows(title, points, "log π/π_ref, nats a token, ± 2 standard errors", level=("reference", 0.0))
    caption = (
        "Left of the line a response became less likely. Both of an expert's to the left: probability went elsewhere."
    )
    cells = [[p.name, number(p.value), number(p.low), number(p.high)] for p in points]
    return Figure(title, svg, caption, ["", "mean", "low", "high"], cells)


def expert_length(rows: ExpertRows) -> Figure:
    """How often each expert prefers the longer response, beside the people themselves."""
    longer = np.sign(rows.length_difference)
    differs = longer != 0
    people = Interval("the people", *_share(longer[differs] > 0))
    points = [people]
    for k in range(rows.margins.shape[1]):
        prefers = (np.sign(rows.margins[:, k]) * longer)[differs] > 0
        points.append(Interval(expert_name(k), *_share(prefers), colour=expert_colour(k), expert=k))
    title = "Taste for length"
    svg = interval_rows(
        title, points, "share of pairs in which the longer response is preferred", level=("no taste", 0.5)
    )
    caption = "Experts that differ here and nowhere else have merely split on length."
    cells = [[p.name, number(p.value), number(p.low), number(p.high)] for p in points]
    return Figure(title, svg, caption, ["", "share", "low", "high"], cells)


def expert_divergence(found: Sequence[Divergence]) -> Figure:
    """KL divergence of each expert from the reference, from responses that it wrote."""
    points = [
        Interval(expert_name(k), d.mean, d.mean - 2 * d.error, d.mean + 2 * d.error, expert_colour(k), k)
        for k, d in enumerate(found)
    ]
    title = "Distance from the reference"
    svg = interval_rows(
        title, points, "KL(π_k ‖ π_ref), nats a response, ± 2 standard errors", level=("reference", 0.0)
    )
    few = f"Estimated from {found[0].responses} sampled responses an expert; unbiased, and rough where they are few."
    cells = [
        [expert_name(k), number(d.mean), number(d.error), str(d.responses), number(d.tokens)]
        for k, d in enumerate(found)
    ]
    return Figure(title, svg, few, ["", "KL, nats", "error", "responses", "mean tokens"], cells)


def _box(canvas: Canvas, x_of, margins: np.ndarray, y: float, expert: int, name: str, *, pale: bool) -> None:  # type: ignore[no-untyped-def]
    tail, first, middle, third, head = (x_of(float(q)) for q in np.quantile(margins, [0.05, 0.25, 0.5, 0.75, 0.95]))
    colour = expert_colour(expert)
    colour = f"color-mix(in srgb,{colour} 35%,transparent)" if pale else colour
    agrees = float(0.5 * (np.sign(margins) + 1).mean())
    tip = (
        f"{expert_name(expert)}, {name}: mean {margins.mean():+.2f} nats, agrees with {agrees:.0%} of {len(margins):,}"
    )
    canvas.path([(tail, y + 5), (head, y + 5)], colour, expert=expert)
    canvas.box(first, y, max(third - first, 1.5), 10, colour, tip=tip, expert=expert)
    canvas.box(middle - 1, y - 1, 2, 12, "var(--paper,#fff)", expert=expert)


def _summary(margins: np.ndarray) -> list[str]:
    if not len(margins):
        return ["0", "–", "–"]
    agrees = float((0.5 * (np.sign(margins) + 1)).mean())
    return [f"{len(margins):,}", number(float(margins.mean())), f"{agrees:.1%}"]


def _mean(values: np.ndarray) -> tuple[float, float]:
    if len(values) < 2:
        return (float(values[0]) if len(values) else math.nan), math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def _share(hits: np.ndarray) -> tuple[float, float, float]:
    """Mean with a normal interval; nan without rows."""
    if not len(hits):
        return math.nan, math.nan, math.nan
    share = float(hits.mean())
    error = 2 * math.sqrt(max(share * (1 - share), 1e-9) / len(hits))
    return share, share - error, share + error
