"""What an evaluation says: figures with intervals, as JSON and as a plain-text table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prefmix.data.counted import counted
from prefmix.evaluation.baselines import Baselines
from prefmix.evaluation.intervals import Estimate, cluster_bootstraps
from prefmix.evaluation.metrics import Agreement, expected_calibration_error, hits
from prefmix.evaluation.scoring import Predictions

FEW_PEOPLE = 10  # of five rows each: their accuracy is good to 0.14 (95%)


@dataclass(frozen=True)
class Figures:
    """How well one way of choosing weights predicts some comparisons.

    Attributes:
        accuracy: share ranked right, ties one half; interval over people.
        log_loss: - mean log p, nats; interval over people; nan of a rule that gives no probabilities.
        ece: expected calibration error, ten equal-width bins of max(p, 1-p); nan of such a rule.
        by_group: accuracy in each true group, where rows name one.
    """

    accuracy: Estimate
    log_loss: Estimate
    ece: float
    by_group: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst_group(self) -> float | None:
        """The lowest accuracy over true groups; None where rows name no group."""
        return min(self.by_group.values()) if self.by_group else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "accuracy": self.accuracy._asdict(),
            "log_loss": self.log_loss._asdict(),
            "ece": self.ece,
            "by_group": dict(self.by_group),
            "worst_group": self.worst_group,
        }


def figures(
    predictions: Predictions, user: np.ndarray, group: np.ndarray, groups: Sequence[str], seed: int = 0
) -> Figures:
    """Figures of B predictions.

    Args:
        predictions: of B comparisons; log-probabilities of nan are those of a rule, which gives none.
        user: [B] the person, -1 where unknown (a cluster of its own).
        group: [B] index of the true group, -1 where unknown.
        groups: group names.
        seed: of the bootstrap.
    """
    hits_B, is_rule = hits(predictions.logit), bool(np.isnan(predictions.log_prob).any())
    share, loss = cluster_bootstraps(np.column_stack([hits_B, -predictions.log_prob]), user, seed=seed)
    return Figures(
        accuracy=share,
        log_loss=loss,
        ece=math.nan if is_rule else expected_calibration_error(predictions.logit),
        by_group={str(groups[g]): float(hits_B[group == g].mean()) for g in np.unique(group[group >= 0])},
    )


@dataclass(frozen=True)
class EvaluationReport:
    """Figures of one policy on held-out comparisons.

    Attributes:
        name: what the policy is called in tables.
        num_comparisons, num_users, num_texts: size of the evaluation set.
        baselines: no opinion, the reference's likelihood, length.
        population: weights from the gate alone.
        personalised: posterior weights of users that the policy knows from training; None without such rows.
        num_known_rows: rows of known users.
        new_users: n -> figures with the posterior from n context comparisons; one set of rows is scored for all n.
        new_users_met: whether the people of `new_users` also trained the experts (their training evidence is hidden).
        expert_accuracy: K accuracies, each expert alone on all rows.
        agreement: most probable expert of users (`pair`: of rows) against true groups; None without true groups.
        usage: K mean responsibilities over known users, else mean gate weights over rows.
        predictions: way -> per-row predictions, for paired comparisons; not in `to_dict`.
        user: [B] person of each row, for clustering; not in `to_dict`.
    """

    name: str
    num_comparisons: int
    num_users: int
    num_texts: int
    baselines: Baselines
    population: Figures
    personalised: Figures | None
    num_known_rows: int
    new_users: Mapping[int, Figures]
    new_users_met: bool
    expert_accuracy: Sequence[float]
    agreement: Agreement | None
    usage: Sequence[float]
    predictions: Mapping[str, Predictions] = field(default_factory=dict, repr=False)
    user: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)

    @property
    def best(self) -> Figures:
        """What the policy gives its users: personalised where it knows them, else population."""
        return self.personalised if self.personalised is not None else self.population

    def to_dict(self) -> dict[str, Any]:
        """JSON values, nan as null."""
        return finite(
            {
                "name": self.name,
                "num_comparisons": self.num_comparisons,
                "num_users": self.num_users,
                "num_texts": self.num_texts,
                "num_known_rows": self.num_known_rows,
                "baselines": self.baselines.to_dict(),
                "population": self.population.to_dict(),
                "personalised": self.personalised.to_dict() if self.personalised else None,
                "new_users": {str(n): figure.to_dict() for n, figure in self.new_users.items()},
                "new_users_met": self.new_users_met,
                "expert_accuracy": list(self.expert_accuracy),
                "agreement": self.agreement._asdict() if self.agreement else None,
                "usage": list(self.usage),
            }
        )

    def table(self) -> str:
        """Plain text for a terminal."""
        rows = [*self.baselines.rows(), ("population (gate only)", self.population)]
        if self.personalised is not None:
            known = counted(self.num_known_rows, "row")
            rows.append((f"personalised ({known} of known users)", self.personalised))
        met = "known people, evidence hidden" if self.new_users_met else "new people"
        rows += [(f"{met}: {counted(n, 'context row')}", figure) for n, figure in self.new_users.items()]
        cells = [
            [
                name,
                _interval(f.accuracy),
                three_digits(f.log_loss.mean),
                three_digits(f.ece),
                three_digits(f.worst_group),
            ]
            for name, f in rows
        ]
        header = ["", "accuracy [95% over people]", "log-loss", "ECE", "worst group"]
        if all(figure.worst_group is None for _, figure in rows):
            header, cells = header[:-1], [row[:-1] for row in cells]
        people = counted(self.num_users, "person", "people")
        sizes = f"{counted(self.num_comparisons, 'comparison')} of {people} over {counted(self.num_texts, 'text')}"
        lines = [f"{self.name}: {sizes}", plain_table(header, cells)]
        if self.new_users:
            lines.append(new_users_note(self.new_users, met))
        lines.append("usage " + " ".join(f"{share:.2f}" for share in self.usage))
        if self.agreement is not None:
            a = self.agreement
            lines.append(f"true groups: ARI {a.ari:.2f}, NMI {a.nmi:.2f}, matched accuracy {a.matched_accuracy:.2f}")
        return "\n".join(lines)


def new_users_note(new_users: Mapping[int, Figures], called: str) -> str:
    """Which rows the figures of new people are of, and why their 0 is not the population's figure."""
    first = next(iter(new_users.values())).accuracy
    rows = f"{counted(first.num_rows, 'row')} of {counted(first.clusters, 'person', 'people')}"
    most, have = counted(max(new_users), "other row"), "has" if first.clusters == 1 else "have"
    few = "; so few people that chance moves the figures" if first.clusters < FEW_PEOPLE else ""
    alone = f"with 0 shown it is the population's figure on these rows alone{few}"
    return f"{called}: {rows} who {have} {most} to show; {alone}"


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces: the first to the left, the others to the right."""
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def finite(value: Any) -> Any:
    """The same JSON value with nan and infinities as None (JSON has neither) and numpy scalars as Python's."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f}" if math.isnan(estimate.se) else str(estimate)


def three_digits(value: float | None) -> str:
    """As tables write a figure; empty where there is none."""
    return "" if value is None or math.isnan(value) else f"{value:.3f}"
