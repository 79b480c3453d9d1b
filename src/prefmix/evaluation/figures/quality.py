"""How good it is: accuracy with intervals, calibration, and what a few comparisons of a new person are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from prefmix.evaluation.baselines import LABELS
from prefmix.evaluation.figures.canvas import WIDTH, Canvas, Figure, number, ticks
from prefmix.evaluation.figures.charts import LEFT, PLOT, RIGHT, Curve, Interval, interval_rows, line_chart
from prefmix.evaluation.metrics import reliability
from prefmix.evaluation.report import EvaluationReport, Figures

# None of them is the colour of an expert.
COLOURS = {
    LABELS["likelier"]: "currentColor",
    LABELS["longer"]: "currentColor",
    "gate alone": "var(--second,#7D858C)",
    "personalised": "var(--accent,#6B3FA0)",
}
OTHER = "var(--third,#9C6B1E)"


def ways(report: EvaluationReport, against: Mapping[str, EvaluationReport] | None = None) -> dict[str, Figures]:
    """Names and figures of every way to choose weights, other policies on the same rows after the baselines."""
    found = dict(report.baselines.rows())
    found |= {name: other.best for name, other in (against or {}).items()}
    found["gate alone"] = report.population
    if report.personalised is not None:
        found["personalised"] = report.personalised
    return found


def accuracy_by_way(report: EvaluationReport, against: Mapping[str, EvaluationReport] | None = None) -> Figure:
    """Held-out accuracy of every way to choose weights, 95% intervals over people; no opinion is the line of a coin."""
    entries = ways(report, against)
    del entries[LABELS["untrained"]]
    points = [
        Interval(name, f.accuracy.mean, f.accuracy.low, f.accuracy.high, COLOURS.get(name, OTHER))
        for name, f in entries.items()
    ]
    title = "Held-out accuracy"
    svg = interval_rows(
        title, points, "share of comparisons ranked as the person did, 95% over people", level=("a coin", 0.5)
    )
    cells = [[name, str(f.accuracy), number(f.log_loss.mean, 4)] for name, f in entries.items()]
    caption = "Intervals resample people, so they show what other people like these would have given."
    return Figure(title, svg, caption, ["", "accuracy", "log-loss"], cells)


def reliability_diagram(logits: Mapping[str, np.ndarray], num_bins: int = 10) -> Figure:
    """Confidence against accuracy, with how many rows stand behind each point.

    Args:
        logits: name -> [B] log p(chosen) - log p(rejected) of held-out rows.
        num_bins: bins of equal width of the confidence max(p, 1 - p).
    """
    title = "Reliability"
    canvas = Canvas(title, 0)
    entries = [(name, COLOURS.get(name, OTHER)) for name in logits]
    top, right = canvas.legend(10, entries) + 18, WIDTH - RIGHT
    bottom, cells = top + PLOT + 30, []
    tables = {name: reliability(logit, num_bins) for name, logit in logits.items()}
    lowest = min((float(a) for table in tables.values() for a in table.accuracy[table.num_rows > 0]), default=0.4)
    floor = 0.2 * math.floor(min(lowest, 0.4) / 0.2 + 1e-9)

    def place(confidence: float, share: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * (confidence - 0.5) / 0.5, bottom - (PLOT + 30) * (share - floor) / (1 - floor)

    for tick in ticks(floor, 1.0):
        canvas.line(LEFT, place(0.5, tick)[1], right, place(0.5, tick)[1])
        canvas.text(LEFT - 7, place(0.5, tick)[1] + 4, f"{tick:g}", anchor="end", muted=True)
    for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        canvas.text(place(tick, 0)[0], bottom + 17, f"{tick:g}", anchor="middle" if tick < 1 else "end", muted=True)
    canvas.line(*place(0.5, 0.5), *place(1.0, 1.0), faint=False, dash=True)
    for name, colour in entries:
        table = tables[name]
        full = np.flatnonzero(table.num_rows)
        points = [place(float(table.confidence[b]), float(table.accuracy[b])) for b in full]
        canvas.path(points, colour)
        for b, (x, y) in zip(full, points, strict=True):
            said, was, count = table.confidence[b], table.accuracy[b], int(table.num_rows[b])
            size = 2.5 + 5.5 * math.sqrt(count / table.num_rows.max())
            canvas.dot(x, y, colour, tip=f"{name}: said {said:.0%}, was right in {was:.0%} of {count:,} rows", r=size)
            cells.append([name, number(float(said)), number(float(was)), f"{count:,}"])
    canvas.text(0, top - 8, "share right", muted=True)
    canvas.text((LEFT + right) / 2, bottom + 36, "confidence", anchor="middle", muted=True)
    canvas.height = bottom + 42
    caption = "On the broken line probabilities mean what they say; below it they are too sure. Area of a point: rows."
    return Figure(title, canvas.svg(), caption, ["", "confidence", "share right", "rows"], cells)


def new_people(by_size: Mapping[int, Figures], met: bool) -> Figure:
    """What n comparisons of a person tell about that person's other comparisons, without training.

    Args:
        by_size: n -> figures of one set of rows.
        met: whether these people also trained the experts (their evidence was hidden).
    """
    points = [(float(n), figure.log_loss.mean) for n, figure in sorted(by_size.items())]
    title = "New people"
    curve = Curve("log-loss", points, "var(--accent,#6B3FA0)")
    svg = line_chart(
        title, [curve], x_label="comparisons shown", y_label="nats per row", spaced=True, dots=True,
        level=("a coin", math.log(2)),
    )  # fmt: skip
    who = "People of the training rows, what is known of them hidden." if met else "People nobody trained on."
    cells = [[str(n), str(f.accuracy), str(f.log_loss)] for n, f in sorted(by_size.items())]
    return Figure(title, svg, f"{who} Lower is better.", ["comparisons shown", "accuracy", "log-loss"], cells)


def headline_rows(
    report: EvaluationReport, against: Mapping[str, EvaluationReport] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the headline table."""
    header = ["", "accuracy [95% over people]", "log-loss", "calibration error", "worst group"]
    rows: list[list[str]] = []
    entries = ways(report, against)
    entries |= {f"{new_users_called(report)}: {n} shown": figure for n, figure in report.new_users.items()}
    for name, f in entries.items():
        worst = "–" if f.worst_group is None else f"{f.worst_group:.3f}"
        loss, ece = ("–" if math.isnan(value) else f"{value:.3f}" for value in (f.log_loss.mean, f.ece))
        spread = str(f.accuracy) if math.isfinite(f.accuracy.se) else f"{f.accuracy.mean:.3f}"
        rows.append([name, spread, loss, ece, worst])
    return _without_empty_last(header, rows)


def new_users_called(report: EvaluationReport) -> str:
    """What the rows of new people are called in the headline table."""
    return "known people, hidden" if report.new_users_met else "new people"


def _without_empty_last(header: Sequence[str], rows: Sequence[list[str]]) -> tuple[list[str], list[list[str]]]:
    if any(row[-1] != "–" for row in rows):
        return list(header), list(rows)
    return list(header[:-1]), [row[:-1] for row in rows]
