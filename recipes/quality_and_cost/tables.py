"""From margins of held-out pairs to figures, paired intervals, the table and the pictures.

Legend: B pairs, J judgements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from arms import Arm
from debates import Pairs
from runs import cost

from prefmix.evaluation.intervals import Estimate, paired_difference
from prefmix.evaluation.metrics import hits
from prefmix.evaluation.plots import ScatterPoint, scatter_svg
from prefmix.evaluation.report import plain_table

BASELINE = "head, hidden, r=16"  # the default, with which everything is compared


class Figures(NamedTuple):
    """Means over judgements.

    Attributes:
        accuracy: share of people's judgements that the model ranks as they did.
        log_loss: - mean log probability of their judgements, nats; 0.693 for a coin.
    """

    accuracy: float
    log_loss: float

    def to_dict(self) -> dict[str, float]:
        """JSON values."""
        return {name: round(value, 5) for name, value in self._asdict().items()}


class Judgements(NamedTuple):
    """One number for each person's judgement.

    Attributes:
        hits: [J] whether the model ranks the pair as this person did; half for no opinion.
        losses: [J] - log probability of this person's judgement, nats.
        side: [J] the debate's side.
    """

    hits: np.ndarray
    losses: np.ndarray
    side: np.ndarray


class Line(NamedTuple):
    """One arm in the table; figures are means over its seeds.

    Attributes:
        arm: which.
        rate: the chosen learning rate.
        seconds: CPU seconds of each seed's run.
        figures: on test judgements.
        accuracy: minus the baseline's, paired over judgements, clusters are sides of debates.
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


def judgements(margins: np.ndarray, pairs: Pairs) -> Judgements:
    """Every vote for the chosen argument counts log sigmoid(m), every other one log sigmoid(-m).

    Args:
        margins: [B] nats.
        pairs: their votes.
    """
    margins, votes = np.asarray(margins, dtype=np.float64), pairs.votes.reshape(-1)
    signed = np.stack([margins, -margins], axis=1).reshape(-1)
    return Judgements(
        np.repeat(hits(signed), votes),
        np.repeat(np.logaddexp(0.0, -signed), votes),
        pairs.topic.repeat(2).repeat(votes),
    )


def judge(margins: np.ndarray, pairs: Pairs) -> Figures:
    """Accuracy and log-loss over people's judgements."""
    found = judgements(margins, pairs)
    return Figures(float(found.hits.mean()), float(found.losses.mean()))


def lines(results: Mapping[str, Any], arms: Sequence[Arm], test: Pairs) -> list[Line]:
    """Figures of all finished arms."""
    judged = {arm.name: _over_seeds(results, arm, test) for arm in arms}
    found = []
    for arm in arms:
        own, base = judged[arm.name], judged.get(BASELINE, judged[arm.name])
        records = _records(results, arm)
        found.append(
            Line(
                arm,
                results["chosen"][arm.name],
                [cost(arm, record["loop_seconds"], results["reading_seconds"]) for record in records],
                Figures(float(own.hits.mean()), float(own.losses.mean())),
                paired_difference(own.hits, base.hits, own.side),
                paired_difference(own.losses, base.losses, own.side),
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
        ]
        for line in lines(results, arms, test)
    ]
    header = ["", "trained", "rate", "seeds", "CPU s", "accuracy", "points to default", "log-loss", "nats to default"]
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


def _over_seeds(results: Mapping[str, Any], arm: Arm, test: Pairs) -> Judgements:
    found = [judgements(np.array(record["test"]["margins"]), test) for record in _records(results, arm)]
    return Judgements(
        np.mean([one.hits for one in found], axis=0), np.mean([one.losses for one in found], axis=0), found[0].side
    )


def _records(results: Mapping[str, Any], arm: Arm) -> list[dict[str, Any]]:
    rate = results["chosen"][arm.name]
    names = [f"{arm.name}, rate {rate:g}, seed {seed}" for seed in arm.seeds]
    return [results["runs"][name] for name in names if "test" in results["runs"].get(name, {})]
