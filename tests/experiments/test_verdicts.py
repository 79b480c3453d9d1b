"""What is said beside the figures: each sentence has figures that bring it up, and a near miss that does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prefmix.evaluation.baselines import Baselines
from prefmix.evaluation.report import EvaluationReport, figures
from prefmix.evaluation.scoring import Predictions
from prefmix.experiments.diagnose_experts import LearntNoise
from prefmix.experiments.diagnosis import Finding
from prefmix.experiments.verdicts import length_rule, verdicts

USER = np.repeat(np.arange(60), 10)
GROUP = np.full(600, -1)


def _opinion(share_right: float, sure: float) -> Predictions:
    logit = sure * np.where(np.arange(600) % 10 < 10 * share_right, 1.0, -1.0)
    return Predictions(-np.log1p(np.exp(-logit)), logit)


def _rule(share_right: float) -> Predictions:
    return Predictions(np.full(600, np.nan), np.where(np.arange(600) % 10 < 10 * share_right, 2.0, -2.0))


def _report(personalised: Predictions, population: Predictions, longer: Predictions) -> EvaluationReport:
    ways = {
        "untrained": Predictions(np.full(600, -np.log(2.0)), np.zeros(600)),
        "likelier": _rule(0.3),
        "longer": longer,
        "population": population,
        "personalised": personalised,
    }
    found = {name: figures(way, USER, GROUP, ()) for name, way in ways.items()}
    simple = Baselines(*(found[name] for name in Baselines._fields))
    return EvaluationReport(
        "x", 600, 60, 9, simple, found["population"], found["personalised"], 600, {}, False, [0.5], None, [1.0],
        ways, USER,
    )  # fmt: skip


def _found(report: EvaluationReport, noise: LearntNoise | None = None) -> dict[str, Finding]:
    return {finding.check: finding for finding in verdicts(report, noise)}


def test_a_good_policy_gets_one_line_and_no_warning() -> None:
    found = _found(_report(_opinion(0.8, 1.0), _opinion(0.6, 0.3), _rule(0.6)))
    assert {name: finding.level for name, finding in found.items()} == {"length": "fine"}
    assert "always taking the longer response ranks 60.0%" in found["length"].what
    assert "clearly above that (+20.0 points" in found["length"].what


def test_what_is_no_better_than_length_is_told_so_at_whichever_end() -> None:
    report = _report(_opinion(0.7, 0.5), _opinion(0.6, 0.3), _rule(0.3))
    assert length_rule(report).name == "shorter" and np.isclose(length_rule(report).accuracy, 0.7)
    length = _found(report)["length"]
    assert length.level == "warning" and "shorter response ranks 70.0%" in length.what
    assert _found(_report(_opinion(0.5, 0.1), _opinion(0.6, 0.1), _rule(0.2)))["length"].how_much["high"] < 0
    even = _report(_opinion(0.7, 0.5), _opinion(0.6, 0.3), Predictions(np.full(600, np.nan), np.zeros(600)))
    assert "length" not in _found(even)  # all pairs are of equal length


def test_too_sure_is_said_with_what_to_train_otherwise() -> None:
    report = _report(_opinion(0.6, 4.0), _opinion(0.6, 0.2), _rule(0.5))
    found = _found(report)
    assert f"its log-loss, {report.best.log_loss.mean:.3f}, is above a coin's 0.693" in found["log-loss"].what
    assert "sft_weight" in found["log-loss"].remedy and "set or raise label_noise" in found["log-loss"].remedy
    assert "label_noise_prior" in _found(report, LearntNoise(0.1, [1.2, 2.8], True))["log-loss"].remedy


def test_personalisation_that_loses_against_the_gate_is_said_once_it_is_more_than_noise() -> None:
    lost = _found(_report(_opinion(0.6, 0.9), _opinion(0.6, 0.3), _rule(0.5)))["personalisation"]
    assert lost.level == "warning" and lost.how_much["low"] > 0 and "log-loss" in lost.what
    # Less than a hundredth of a nat: worth a note, no alarm.
    assert _found(_report(_opinion(0.6, 0.45), _opinion(0.6, 0.4), _rule(0.5)))["personalisation"].level == "note"
    assert "personalisation" not in _found(_report(_opinion(0.6, 0.4), _opinion(0.6, 0.3), _rule(0.5)))


def test_one_person_has_no_interval() -> None:
    report = _report(_opinion(0.7, 2.0), _opinion(0.6, 0.1), _rule(0.6))
    found = _found(replace(report, user=np.zeros(600, np.int64)))
    assert {"length", "personalisation"} <= set(found)
    assert all("no interval: one person" in found[name].what for name in ("length", "personalisation"))
    assert "nan" not in " ".join(finding.what for finding in found.values())
