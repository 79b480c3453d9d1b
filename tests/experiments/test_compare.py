"""Means over seeds, the share of the gap, and the table, on reports made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from prefmix.evaluation.baselines import Baselines
from prefmix.evaluation.metrics import Agreement
from prefmix.evaluation.report import EvaluationReport, figures
from prefmix.evaluation.scoring import Predictions
from prefmix.experiments.baselines import standard_arms
from prefmix.experiments.compare import Comparison, SeedResult, mean_over_seeds
from prefmix.experiments.probe_baseline import ProbeBaseline

USER, GROUP, GROUPS = np.repeat(np.arange(50), 10), np.repeat(np.arange(50) % 2, 10), ("a", "b")


def report(name: str, share_right: float, ari: float | None) -> EvaluationReport:
    right = np.arange(500) % 100 < 100 * share_right
    logit = np.where(right, 1.0, -1.0)
    predictions = Predictions(-np.log1p(np.exp(-logit)), logit)
    figure = figures(predictions, USER, GROUP, GROUPS)
    agreement = None if ari is None else Agreement(ari, ari, ari, 50)
    return EvaluationReport(
        name, 500, 50, 10, Baselines(figure, figure, figure), figure, figure, 500, {}, False, [0.5], agreement, [1.0],
        {"personalised": predictions}, USER,
    )  # fmt: skip


def seed_result(seed: int, single: float, mixture: float, oracle: float) -> SeedResult:
    reports = {
        "single DPO": report("single DPO", single, None),
        "mixture": report("mixture", mixture, 0.9 + 0.02 * seed),
        "oracle": report("oracle", oracle, None),
    }
    figure = reports["mixture"].best
    probe = ProbeBaseline(figure, reports["mixture"].predictions["personalised"], None, np.zeros((50, 2)))
    return SeedResult(seed, reports, dict.fromkeys(reports, 3), dict.fromkeys(reports, [0.7, 0.6, 0.5]), probe)


def test_mean_over_seeds_leaves_out_what_is_undefined() -> None:
    assert mean_over_seeds([1.0, None, 3.0]) == (2.0, pytest.approx(np.sqrt(2)), 2)
    assert mean_over_seeds([None]).num_seeds == 0 and str(mean_over_seeds([None])) == ""


def test_share_of_gap_of_a_seed_and_over_seeds() -> None:
    results = [seed_result(0, 0.5, 0.69, 0.7), seed_result(1, 0.5, 0.73, 0.75)]
    assert results[0].gap is not None and results[0].gap.share == pytest.approx(0.95)
    share = Comparison("x", results).share_of_gap()
    assert share is not None and share.share == pytest.approx((0.71 - 0.5) / (0.725 - 0.5))


def test_a_gap_within_its_error_is_undefined() -> None:
    result = seed_result(0, 0.7, 0.7, 0.7)
    assert result.gap is not None and result.gap.share is None
    assert "undefined" in Comparison("x", [result]).table()


def test_table_and_json() -> None:
    comparison = Comparison("setting", [seed_result(0, 0.5, 0.69, 0.7), seed_result(1, 0.5, 0.73, 0.75)])
    table = comparison.table()
    assert "0.910 ± 0.014" in table and "single DPO" in table and "probe" in table
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["share_of_gap"]["share"] > 0.9


def test_standard_arms_are_one_trainer_with_different_options() -> None:
    arms = standard_arms(3, 2)
    assert arms["single DPO"].options["num_experts"] == 1
    assert arms["oracle"].options["num_experts"] == 2 and arms["oracle"].true_groups
    assert "oracle" not in standard_arms(3, None)
