"""Several models on the same rows, over seeds: mean and spread, the share of the oracle's gap, JSON and a table.

Legend: S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefmix.evaluation.intervals import paired_difference
from prefmix.evaluation.metrics import ShareOfGap, hits, share_of_gap_closed
from prefmix.evaluation.report import EvaluationReport, finite, plain_table
from prefmix.experiments.baselines import Arm, Splits, TrainedArm, table_states, train_arm
from prefmix.experiments.probe_baseline import ProbeBaseline, probe_baseline
from prefmix.experts.base_model import BaseModel

SINGLE, MIXTURE, ORACLE = "single DPO", "mixture", "oracle"


class Mean(NamedTuple):
    """Mean and spread over seeds.

    Attributes:
        mean: of the values that are defined.
        spread: their standard deviation (S - 1 in the denominator); 0 for one seed.
        num_seeds: how many are defined.
    """

    mean: float
    spread: float
    num_seeds: int

    def __str__(self) -> str:
        return "" if not self.num_seeds else f"{self.mean:.3f} ± {self.spread:.3f}"


def mean_over_seeds(values: Sequence[float | None]) -> Mean:
    """Mean and spread of the values that are not None."""
    defined = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(defined) == 0:
        return Mean(float("nan"), float("nan"), 0)
    return Mean(float(defined.mean()), float(defined.std(ddof=1)) if len(defined) > 1 else 0.0, len(defined))


@dataclass(frozen=True)
class SeedResult:
    """All models of one seed on the same test rows.

    Attributes:
        seed: of data, heads and order.
        reports: model -> report.
        epochs: model -> epoch chosen on validation rows.
        validation: model -> validation log-loss after each epoch.
        probe: the probe's figures.
    """

    seed: int
    reports: Mapping[str, EvaluationReport]
    epochs: Mapping[str, int]
    validation: Mapping[str, Sequence[float]]
    probe: ProbeBaseline

    @property
    def gap(self) -> ShareOfGap | None:
        """Share of the gap in personalised accuracy between single DPO and the oracle; None without an oracle."""
        if not {SINGLE, MIXTURE, ORACLE} <= self.reports.keys():
            return None
        mixture, single, oracle = (self.reports[name] for name in (MIXTURE, SINGLE, ORACLE))
        best = [hits(report.predictions["personalised"].logit) for report in (oracle, single)]
        gap_se = paired_difference(best[0], best[1], oracle.user, seed=self.seed).se
        accuracies = [report.best.accuracy.mean for report in (mixture, single, oracle)]
        return share_of_gap_closed(accuracies[0], accuracies[1], accuracies[2], gap_se)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        probe = {"figures": self.probe.figures.to_dict()}
        probe["agreement"] = self.probe.agreement._asdict() if self.probe.agreement else None  # type: ignore[assignment]
        return finite(
            {
                "seed": self.seed,
                "reports": {name: report.to_dict() for name, report in self.reports.items()},
                "epochs": dict(self.epochs),
                "validation_log_loss": {name: list(losses) for name, losses in self.validation.items()},
                "probe": probe,
                "share_of_gap": self.gap._asdict() if self.gap else None,
            }
        )


@dataclass(frozen=True)
class Comparison:
    """One setting over seeds.

    Attributes:
        name: of the setting.
        results: one for each seed.
    """

    name: str
    results: Sequence[SeedResult]

    def share_of_gap(self) -> ShareOfGap | None:
        """The share from mean accuracies over seeds; undefined under the same rule as for one seed."""
        gaps = [result.gap for result in self.results]
        known = [gap for gap in gaps if gap is not None]
        if not known:
            return None
        single, mixture, oracle = (
            float(np.mean([result.reports[name].best.accuracy.mean for result in self.results]))
            for name in (SINGLE, MIXTURE, ORACLE)
        )
        gap_se = float(np.sqrt(np.mean([gap.gap_se**2 for gap in known]) / len(known)))
        return share_of_gap_closed(mixture, single, oracle, gap_se)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        share = self.share_of_gap()
        return finite(
            {
                "name": self.name,
                "share_of_gap": share._asdict() if share else None,
                "results": [result.to_dict() for result in self.results],
            }
        )

    def table(self) -> str:
        """Plain text: mean ± spread over seeds."""
        names = list(self.results[0].reports)
        simple = [dict(result.reports[names[0]].baselines.rows()) for result in self.results]
        rows = [[label, *_columns([found[label] for found in simple]), "", ""] for label in simple[0]]
        for name in names:
            reports = [result.reports[name] for result in self.results]
            agreement = [report.agreement.ari if report.agreement else None for report in reports]
            ari = "" if name in (SINGLE, ORACLE) else str(mean_over_seeds(agreement))
            epochs = ", ".join(str(result.epochs[name]) for result in self.results)
            rows.append([name, *_columns([report.best for report in reports]), ari, epochs])
        probes = [result.probe for result in self.results]
        ari = str(mean_over_seeds([probe.agreement.ari if probe.agreement else None for probe in probes]))
        rows.append(["probe (linear, no expert)", *_columns([probe.figures for probe in probes]), ari, ""])
        header = ["", "accuracy", "log-loss", "ECE", "worst group", "ARI", "epochs chosen"]
        title = f"{self.name}: {len(self.results)} seed(s), mean ± spread, personalised, texts that nobody trained on"
        share = self.share_of_gap()
        closing = (
            []
            if share is None
            else [f"share of the gap from single DPO to the oracle that the mixture closes: {share}"]
        )
        return "\n".join([title, plain_table(header, rows), *closing])


def run_seed(
    splits: Splits,
    base: BaseModel,
    arms: Mapping[str, Arm],
    options: Mapping[str, Any],
    *,
    num_experts: int,
    seed: int,
    output_dir: str | Path,
    say: Callable[[str], None] = print,
) -> SeedResult:
    """Trains all arms on the same rows and cached states, and the probe beside them.

    Args:
        splits: tables of this seed.
        base: the base model.
        arms: what to train.
        options: fields of `MixtureConfig` for all arms.
        num_experts: K of the probe.
        seed: of heads, order and starts.
        output_dir: folder for runs; each is removed after its evaluation.
        say: gets one line for each model.
    """
    states = [table_states(table, base, options) for table in (splits.train, splits.test)]
    dim = int(options.get("probe_dim", 64))
    probe = probe_baseline(splits.train, states[0], splits.test, states[1], num_experts=num_experts, dim=dim, seed=seed)
    say(f"seed {seed}: probe: accuracy {probe.figures.accuracy.mean:.3f}{_ari(probe.agreement)}")
    trained: dict[str, TrainedArm] = {}
    for name, arm in arms.items():
        trained[name] = train_arm(arm, splits, base, options, seed=seed, output_dir=output_dir)
        report, epoch = trained[name].report, trained[name].epoch
        say(f"seed {seed}: {name}: accuracy {report.best.accuracy.mean:.3f} (epoch {epoch}){_ari(report.agreement)}")
    return SeedResult(
        seed,
        {name: arm.report for name, arm in trained.items()},
        {name: arm.epoch for name, arm in trained.items()},
        {name: arm.validation for name, arm in trained.items()},
        probe,
    )


def _columns(figures: Sequence[Any]) -> list[str]:
    accuracy = mean_over_seeds([figure.accuracy.mean for figure in figures])
    log_loss = mean_over_seeds([_or_none(figure.log_loss.mean) for figure in figures])
    ece = mean_over_seeds([_or_none(figure.ece) for figure in figures])
    worst = mean_over_seeds([figure.worst_group for figure in figures])
    return [str(accuracy), str(log_loss), str(ece), str(worst)]


def _or_none(value: float) -> float | None:
    """Rules give no probabilities, and so no log-loss."""
    return None if math.isnan(value) else value


def _ari(agreement: Any) -> str:
    return "" if agreement is None else f", ARI {agreement.ari:.2f}"
