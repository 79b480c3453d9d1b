"""The search over K for people: from rows and cached states to a table, a picture, JSON, and the next command.

Legend: N texts, B comparisons, P features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from prefmix.data.comparisons import ComparisonTable
from prefmix.evaluation.plots import curve_svg
from prefmix.evaluation.report import finite, plain_table
from prefmix.experiments.choose_k import Candidate, Choice, choose_k
from prefmix.experiments.confirm_k import Confirmation
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.mixture.features import pool_features
from prefmix.mixture.linear_em import ProbeData


class ChoiceReport(NamedTuple):
    """A choice of K with what it was made from.

    Attributes:
        choice: of the probe.
        comparisons: rows of named users, which were used.
        rows_without_user: rows that could say nothing about groups of users.
        confirmation: held-out evidence of trained experts, where asked for.
    """

    choice: Choice
    comparisons: int
    rows_without_user: int
    confirmation: Confirmation | None = None

    @property
    def num_experts(self) -> int:
        """K to train: the confirmed one where experts were trained, else the probe's."""
        return self.choice.num_experts if self.confirmation is None else self.confirmation.num_experts

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        choice = self.choice._asdict() | {"candidates": [c._asdict() for c in self.choice.candidates]}
        confirmation = None if self.confirmation is None else self.confirmation.to_dict()
        entries = {"num_experts": self.num_experts, "probe": choice, "confirmation": confirmation}
        entries |= {"comparisons": self.comparisons, "rows_without_user": self.rows_without_user}
        return finite(entries)

    def text(self) -> str:
        """A table over K, and in a line each what the other rules say."""
        c = self.choice
        header = ["K", "held-out evidence", "worse than best by", "BIC", "ICL", "restarts agree"]
        rows = [_row(entry, c) for entry in c.candidates]
        lines = [
            f"{self.comparisons} comparisons of {c.num_users} users; evidence of a held-out user, nats",
            plain_table(header, rows),
            f"{c.num_experts} group(s): the smallest K within one standard error of the best ({c.best}). "
            f"BIC says {c.by_bic}, ICL {c.by_icl}, pruning from {c.candidates[-1].num_experts} says {c.by_pruning}.",
        ]
        if self.rows_without_user:
            lines.append(f"{self.rows_without_user} rows name no user and were left out.")
        if self.confirmation is not None:
            lines.append(self.confirmation.text())
        return "\n\n".join(lines)

    def svg(self) -> str:
        """Evidence of held-out users, BIC and ICL over K, nats a user above one group."""
        c, first = self.choice, self.choice.candidates[0]

        def above(name: str, scale: float) -> list[tuple[float, float]]:
            return [(e.num_experts, (getattr(e, name) - getattr(first, name)) / scale) for e in c.candidates]

        held_out = above("held_out", 1.0)
        curves = {
            "held-out users": held_out,
            "BIC": above("bic", c.num_users),
            "ICL": above("icl", c.num_users),
            f"chosen: {c.num_experts}": [point for point in held_out if point[0] == c.num_experts],
        }
        label = f"nats a user above K = {first.num_experts}"
        return curve_svg("How many groups of users?", "number of groups K", label, curves)


def user_rows(table: ComparisonTable) -> np.ndarray:
    """[M] rows whose user is named: without a name a row says nothing about groups of users."""
    return np.flatnonzero(table.user >= 0)


def choose_k_rows(
    table: ComparisonTable,
    states: TrunkStates,
    *,
    candidates: Sequence[int] = tuple(range(1, 9)),
    dim: int = 64,
    seed: int = 0,
    folds: int = 4,
    restarts: int = 2,
) -> ChoiceReport:
    """Chooses K for a table of comparisons.

    Args:
        table: the comparisons.
        states: cached trunk states of its texts.
        candidates: values of K.
        dim: principal directions of the pooled states.
        seed: of folds and starts.
        folds: of the users.
        restarts: starts of each fit.

    Raises:
        ValueError: no row names a user, or too few users do.
    """
    rows = user_rows(table)
    if len(rows) == 0:
        raise ValueError(
            "no row names a user, so groups of users cannot be counted: add a `user` column, or set num_experts"
        )
    lengths = torch.tensor([len(ids) for ids in table.texts.completion_ids])
    prompt = torch.from_numpy(table.texts.prompt_index)
    features = pool_features(states.completion_mean, dim, lengths, centre_by=prompt).features
    difference = features[torch.from_numpy(table.chosen[rows])] - features[torch.from_numpy(table.rejected[rows])]
    data = ProbeData(
        difference, torch.from_numpy(table.user[rows]), torch.from_numpy(table.weight[rows]), len(table.users)
    )
    choice = choose_k(data, candidates, folds=folds, restarts=restarts, seed=seed)
    return ChoiceReport(choice, len(rows), len(table) - len(rows))


def _row(entry: Candidate, choice: Choice) -> list[str]:
    agree = "-" if math.isnan(entry.restart_agreement) else f"{entry.restart_agreement:.2f}"
    return [
        f"{entry.num_experts}{' <- chosen' if entry.num_experts == choice.num_experts else ''}",
        f"{entry.held_out:.3f}",
        "-" if entry.num_experts == choice.best else f"{entry.worse_by:.3f} +- {entry.standard_error:.3f}",
        f"{entry.bic:.1f}",
        f"{entry.icl:.1f}",
        agree,
    ]
