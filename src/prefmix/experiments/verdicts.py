"""What figures say in words: beside the rule of length, beside a coin, and beside the same policy's gate alone.

Legend: B comparisons.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from prefmix.evaluation.intervals import Estimate, paired_difference
from prefmix.evaluation.metrics import hits
from prefmix.evaluation.report import EvaluationReport
from prefmix.experiments.diagnose_experts import LearntNoise, for_sureness
from prefmix.experiments.diagnosis import Finding
from prefmix.training.diagnostics import LOSS_MARGIN, remedy_of_overfitting


class LengthRule(NamedTuple):
    """Always one end of length, whichever these rows like better; a policy has to beat it on the same rows.

    Attributes:
        name: what it takes.
        hits: [B] 1 where it is right, 0.5 where both responses have equally many tokens.
    """

    name: str
    hits: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share ranked right."""
        return float(self.hits.mean())


def length_rule(report: EvaluationReport) -> LengthRule:
    """The better of "longer" and "shorter" on the report's rows: that choice favours the rule a little."""
    longer: np.ndarray = hits(report.predictions["longer"].logit)
    return LengthRule("longer", longer) if longer.mean() >= 0.5 else LengthRule("shorter", 1.0 - longer)


def verdicts(report: EvaluationReport, noise: LearntNoise | None = None, seed: int = 0) -> list[Finding]:
    """What a reader should know beside the table; sentences without a subject's name, first what is worst.

    Args:
        report: of one policy.
        noise: what its training learnt of label noise, which decides the remedy.
        seed: of the intervals.
    """
    found = (_beside_coin(report, noise), _beside_gate(report, noise, seed), _beside_length(report, seed))
    return [finding for finding in found if finding is not None]


def _beside_coin(report: EvaluationReport, noise: LearntNoise | None) -> Finding | None:
    loss, coin = report.best.log_loss.mean, report.baselines.untrained.log_loss.mean
    if not loss > coin:
        return None
    what = f"its log-loss, {loss:.3f}, is above a coin's {coin:.3f}: it is too sure of itself"
    remedy = f"{remedy_of_overfitting()}; or {for_sureness(noise)}"
    return Finding("log-loss", "warning", what, {"log_loss": loss, "coin": coin}, remedy)


def _beside_gate(report: EvaluationReport, noise: LearntNoise | None, seed: int) -> Finding | None:
    if report.personalised is None:
        return None
    mine, gate = (-report.predictions[way].log_prob for way in ("personalised", "population"))
    lost = paired_difference(mine, gate, report.user, seed=seed)
    if not lost.mean > 0:
        return None
    what = (
        f"knowing its users it has a log-loss of {mine.mean():.3f} on all rows, and {gate.mean():.3f} by its gate "
        f"alone ({lost.mean:+.3f} nats, {interval_words(lost, '+.3f')}): "
        "posteriors are surer than people are consistent"
    )
    level, remedy = "warning" if lost.mean > LOSS_MARGIN else "note", f"{for_sureness(noise)}, or train fewer epochs"
    numbers = {"log_loss": float(mine.mean()), "gate_alone": float(gate.mean()), "low": lost.low, "high": lost.high}
    return Finding("personalisation", level, what, numbers, remedy)  # type: ignore[arg-type]


def _beside_length(report: EvaluationReport, seed: int) -> Finding | None:
    rule = length_rule(report)
    if (rule.hits == 0.5).all():
        return None  # all pairs are of equal length
    mine = hits(report.predictions["personalised"].logit)
    gain = paired_difference(mine, rule.hits, report.user, seed=seed)
    points = f"{100 * gain.mean:+.1f} points, {interval_words(gain, '+.1f', 100)}"
    what = f"always taking the {rule.name} response ranks {rule.accuracy:.1%} of all rows as the person did; "
    numbers = {"length_rule": rule.accuracy, "accuracy": float(mine.mean()), "low": gain.low, "high": gain.high}
    if gain.low > 0:
        return Finding("length", "fine", f"{what}this policy is clearly above that ({points})", numbers)
    below = "below" if gain.high < 0 else "not clearly above"
    remedy = "length alone explains as much: pairs of like length show whether it learnt more; then more rows a person"
    return Finding("length", "warning", f"{what}this policy is {below} that ({points})", numbers, remedy)


def interval_words(estimate: Estimate, form: str, scale: float = 1.0) -> str:
    """Ends of an interval, such as "+0.1 to +0.3"; of one person alone there is none."""
    if np.isnan(estimate.low):
        return "no interval: one person"
    return f"{scale * estimate.low:{form}} to {scale * estimate.high:{form}}"
