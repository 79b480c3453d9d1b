"""From margins of held-out pairs to figures, paired intervals, the table and the pictures.

Legend: B pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from arms import Arm
from pairs import Pairs
from runs import cost
from scipy.optimize import minimize_scalar

from prefmix.evaluation.intervals import Estimate
from prefmix.evaluation.metrics import hits
from prefmix.evaluation.plots import ScatterPoint, scatter_svg
from prefmix.evaluation.report import plain_table

BASELINE = "head, hidden, r=16"  # the default, with which everything is compared


class Figures(NamedTuple):
    """Means over held-out pairs.

    Attributes:
        accuracy: share of pairs that the model ranks as the person did; half for no opinion.
        log_loss: - mean log probability of the person's preference, nats; 0.693 for a coin.
        raw_log_loss: the same with the margins as they are, not scaled.
    """

    accuracy: float
    log_loss: float
    raw_log_loss: float

    def to_dict(self) -> dict[str, float]:
        """JSON values."""
        return {name: round(value, 5) for name, value in self._asdict().items()}


class Scores(NamedTuple):
    """One number for each pair.

    Attributes:
        hits: [B] whether the model ranks the pair as the person did; half for no opinion.
        losses: [B] - log probability of the person's preference, nats.
    """

    hits: np.ndarray
    losses: np.ndarray


class Line(NamedTuple):
    """One arm in the table; figures are means over its seeds.

    Attributes:
        arm: which.
        rate: the chosen learning rate.
        seconds: CPU seconds of each seed's run.
        figures: on test pairs.
        accuracy: minus the baseline's, on the same pairs; interval over items.
        log_loss: the same of log-losses; negative is better.
        parameters: trained numbers.
    """

    arm: Arm
    rate: float
    seconds: list[float]
    figures: Figures
    accuracy: Estimate
    log_loss: Estimate
    parameters: int


def scores(margins: np.ndarray, scale: float = 1.0) -> Scores:
    """A pair with margin m has loss - log sigmoid(s m).

    Args:
        margins: [B] nats.
        scale: s.
    """
    margins = np.asarray(margins, dtype=np.float64)
    return Scores(hits(margins), np.logaddexp(0.0, -scale * margins))


def best_scale(margins: np.ndarray) -> float:
    """The scale s >= 0 with the lowest mean of - log sigmoid(s m).

    DPO's margins on few rows are far too sure, the more so the larger the learning rate, and without a scale the best
    log-loss is that of a model which has learned nothing. Fitted on validation pairs, used on test pairs.

    Args:
        margins: [B] nats.
    """
    margins = np.asarray(margins, dtype=np.float64)
    size = float(np.abs(margins).mean())
    if size == 0:
        return 0.0
    found = minimize_scalar(lambda s: np.logaddexp(0.0, -s * margins / size).mean(), bounds=(0, 20), method="bounded")
    return float(found.x) / size


def judge(margins: np.ndarray, scale: float) -> Figures:
    """Accuracy and log-loss. Args: margins [B], nats; scale of `best_scale`."""
    found = scores(margins, scale)
    return Figures(float(found.hits.mean()), float(found.losses.mean()), float(scores(margins).losses.mean()))


def over_items(values: np.ndarray, items: np.ndarray) -> Estimate:
    """Mean of a figure of pairs with an interval over the sampling of items: pairs that share one are not independent.

        se^2 = 1/B^2 sum_{i, j that share an item} e_i e_j,   e_i = v_i - mean

    Args:
        values: [B].
        items: [B, 2] index of each pair's items.

    Source: Fafchamps & Gubert 2007, the dyadic-robust variance.
    Relations: a bootstrap of people (`evaluation.intervals`) would not cover the choice of items; one of items draws
        a pair n_a n_b times, and makes intervals up to 1.7 times too wide where noise belongs to pairs.
    """
    residual, num_items = values - values.mean(), int(items.max()) + 1
    of_item = sum(np.bincount(items[:, side], residual, num_items) for side in (0, 1))
    both = np.unique(np.sort(items, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    shared = (of_item**2).sum() - (np.bincount(both, residual) ** 2).sum()  # who shares both was counted twice
    se = float(np.sqrt(max(shared, (residual**2).sum()))) / len(values)
    mean = float(values.mean())
    return Estimate(mean, se, mean - 1.96 * se, mean + 1.96 * se, len(values), num_items)


def lines(results: Mapping[str, Any], arms: Sequence[Arm], test: Pairs) -> list[Line]:
    """Figures of all finished arms."""
    judged = {arm.name: _over_seeds(results, arm) for arm in arms}
    found = []
    for arm in arms:
        own, base = judged[arm.name], judged.get(BASELINE, judged[arm.name])
        records = _records(results, arm)
        found.append(
            Line(
                arm,
                results["chosen"][arm.name],
                [cost(arm, record["loop_seconds"], results["reading_seconds"]) for record in records],
                Figures(float(own.hits.mean()), float(own.losses.mean()), _mean(records, "raw_log_loss")),
                over_items(own.hits - base.hits, test.items),
                over_items(own.losses - base.losses, test.items),
                records[0]["parameters"],
            )
        )
    return found


def table_text(results: Mapping[str, Any], arms: Sequence[Arm], test: Pairs) -> str:
    """The table of README.md."""
    cells = [
        [
            line.arm.name,
            f"{line.parameters:,}",
            f"{line.rate:g}",
            str(len(line.seconds)),
            f"{np.mean(line.seconds):.0f}",
            f"{line.figures.accuracy:.3f}",
            f"{100 * line.accuracy.mean:+.1f} [{100 * line.accuracy.low:+.1f}, {100 * line.accuracy.high:+.1f}]",
            f"{line.figures.log_loss:.3f}",
            f"{line.log_loss.mean:+.3f} [{line.log_loss.low:+.3f}, {line.log_loss.high:+.3f}]",
            f"{line.figures.raw_log_loss:.3f}",
        ]
        for line in lines(results, arms, test)
    ]
    header = [
        "",
        "trained",
        "rate",
        "seeds",
        "CPU s",
        "accuracy",
        "points to default",
        "log-loss",
        "nats to default",
        "unscaled",
    ]
    baselines = ", ".join(f"{name} {value:.3f}" for name, value in results["baselines"].items())
    return "\n".join([plain_table(header, cells), f"accuracy of: {baselines}"])


def write_pictures(results: Mapping[str, Any], arms: Sequence[Arm], test: Pairs, output: Path) -> None:
    """`<output>-accuracy.svg` and `<output>-log-loss.svg` beside the JSON."""
    found = lines(results, arms, test)
    for name, label in (("accuracy", "held-out accuracy"), ("log_loss", "held-out log-loss, nats (lower is better)")):
        points = [
            ScatterPoint(
                line.arm.family,
                _short_name(line.arm),
                float(np.mean(line.seconds)),
                getattr(line.figures, name),
                *_interval(line, name),
            )
            for line in found
        ]
        svg = scatter_svg("Quality against cost", "CPU seconds of training (logarithmic)", label, points)
        output.with_name(f"{output.stem}-{name.replace('_', '-')}.svg").write_text(svg, encoding="utf-8")


def _interval(line: Line, name: str) -> tuple[float, float]:
    """The interval of the difference to the default, drawn around the arm's own figure."""
    difference, value = getattr(line, name), getattr(line.figures, name)
    return value + difference.low - difference.mean, value + difference.high - difference.mean


def _short_name(arm: Arm) -> str:
    return arm.name.rpartition(", ")[2].replace("r=", "") if ", " in arm.name else ""


def _over_seeds(results: Mapping[str, Any], arm: Arm) -> Scores:
    records = _records(results, arm)
    found = [scores(np.array(record["test"]["margins"]), record["validation"]["scale"]) for record in records]
    return Scores(np.mean([one.hits for one in found], axis=0), np.mean([one.losses for one in found], axis=0))


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([record["test"][name] for record in records]))


def _records(results: Mapping[str, Any], arm: Arm) -> list[dict[str, Any]]:
    rate = results["chosen"][arm.name]
    names = [f"{arm.name}, rate {rate:g}, seed {seed}" for seed in arm.seeds]
    return [results["runs"][name] for name in names if "test" in results["runs"].get(name, {})]
