"""What the probe finds in rows: can groups be told apart, how many there are, and who belongs to which.

The number of groups is chosen on held-out comparisons of the same users: a quarter of each user's comparisons is set
aside, the probe is fitted to the rest, and every K predicts the quarter with each user's posterior.
Legend: B comparisons, N texts, G latent groups (users, and each row without a user), K experts, P features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.users import latent_groups, num_latent_groups
from prefmix.evaluation.metrics import Agreement, adjusted_rand_index, agreement, usage
from prefmix.evaluation.plots import group_map_text, user_order
from prefmix.evaluation.report import finite, plain_table
from prefmix.experiments.probe_baseline import user_groups
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.mixture.features import pool_features
from prefmix.mixture.identifiability import Identifiability, identifiability
from prefmix.mixture.probe import ProbeResult, fit_probe, probe_predict

HELD_OUT_SHARE = 0.25
SHOWN_USERS = 8


class GroupCount(NamedTuple):
    """How well K groups predict held-out comparisons of the same users.

    Attributes:
        num_experts: K.
        log_loss: mean -log p of the held-out comparisons, nats; a coin has log 2 = 0.693.
        accuracy: share of them ranked right.
        worse_by: log_loss minus the best K's, nats.
        standard_error: of that difference, with users as the unit of sampling.
        restart_agreement: mean adjusted Rand index between the best start and the others; nan for K = 1.
    """

    num_experts: int
    log_loss: float
    accuracy: float
    worse_by: float
    standard_error: float
    restart_agreement: float


@dataclass(frozen=True)
class ProbeReport:
    """The probe's answer.

    Attributes:
        comparisons: B.
        users: distinct users.
        identifiable: whether rows like these can tell groups apart, and why.
        counts: one entry for each K that was tried; empty where no user has two comparisons.
        num_experts: the smallest K whose held-out log-loss is within one standard error of the best.
        usage: [K] share of each group, from the fit to all rows.
        agreement: of the found groups with the rows' `group`, where they have one.
        resp: [U, K] posterior of each user.
        truth: [U] true group of each user, -1 where unknown.
        names: U user names.
    """

    comparisons: int
    users: int
    identifiable: Identifiability
    counts: list[GroupCount]
    num_experts: int
    usage: list[float]
    agreement: Agreement | None
    resp: np.ndarray
    truth: np.ndarray
    names: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with every user's posterior."""
        found = {"identified": self.identifiable.identified, "reason": self.identifiable.reason}
        entries = {key: value for key, value in asdict(self).items() if key not in ("resp", "truth", "names")}
        entries |= {
            "identifiable": found,
            "counts": [count._asdict() for count in self.counts],
            "agreement": None if self.agreement is None else self.agreement._asdict(),
            "posterior": dict(zip(self.names, self.resp.tolist())),
        }
        return finite(entries)

    def text(self) -> str:
        """For a terminal: the diagnosis, the table over K, a map of the users, and who they are."""
        parts = [f"{self.comparisons} comparisons, {self.users} users: {self.identifiable.reason}"]
        if self.counts:
            header = ["groups", "held-out log-loss", "accuracy", "worse than best by", "restarts agree"]
            rows = [_count_row(count, count.num_experts == self.num_experts) for count in self.counts]
            parts.append(plain_table(header, rows))
        parts.append(f"{self.num_experts} group(s), usage " + " ".join(f"{share:.2f}" for share in self.usage))
        if self.agreement is not None:
            a = self.agreement
            parts.append(f"true groups: ARI {a.ari:.2f}, NMI {a.nmi:.2f}, matched accuracy {a.matched_accuracy:.2f}")
        if len(self.resp):
            known = (self.truth >= 0).all()
            parts.append(group_map_text(self.resp, self.truth.tolist() if known else None))
        if len(self.resp) and self.num_experts > 1:
            parts.append(members_text(self.resp, self.names))
        return "\n\n".join(parts)


def probe_rows(
    table: ComparisonTable,
    states: TrunkStates,
    *,
    candidates: Sequence[int] = (1, 2, 3, 4),
    dim: int = 64,
    restarts: int = 8,
    seed: int = 0,
) -> ProbeReport:
    """Diagnoses rows and finds groups of users.

    Args:
        table: the comparisons.
        states: cached trunk states of its texts.
        candidates: values of K to compare; a single value is taken as given.
        dim: principal directions of the pooled states.
        restarts: random starts of each fit.
        seed: of splits and starts.

    Raises:
        ValueError: a candidate below 1, or none.
    """
    if not candidates or min(candidates) < 1:
        raise ValueError(f"candidates={list(candidates)}: name numbers of groups, each at least 1")
    lengths = torch.tensor([len(ids) for ids in table.texts.completion_ids])
    prompt = torch.from_numpy(table.texts.prompt_index)
    features = pool_features(states.completion_mean, dim, lengths, centre_by=prompt).features
    data = _Rows(table, features, restarts, seed)
    found = identifiability(
        features,
        *(torch.from_numpy(column) for column in (table.chosen, table.rejected, table.user, table.prompt)),
        generator=data.generator,
    )
    counts = _compare_counts(data, sorted(set(candidates)))
    num_experts = _smallest_within_error(counts) if counts else max(candidates) if len(candidates) == 1 else 1
    fit = data.fit(np.ones(len(table), bool), num_experts)
    resp = fit.log_resp.exp()[: len(table.users)].numpy()
    truth = user_groups(table)
    return ProbeReport(
        comparisons=len(table),
        users=len(np.unique(table.user[table.user >= 0])),
        identifiable=found,
        counts=counts,
        num_experts=num_experts,
        usage=usage(resp).tolist() if len(resp) else fit.log_weights.exp().tolist(),
        agreement=agreement(truth, resp) if len(resp) else None,
        resp=resp,
        truth=truth,
        names=table.users,
    )


def members_text(resp: Float[np.ndarray, "U K"], names: Sequence[str], shown: int = SHOWN_USERS) -> str:
    """Users under their most probable group, the surest first, one line a group.

    Args:
        resp: [U, K] posterior of each user.
        names: U names.
        shown: names in a line; the others are counted.
    """
    lines = []
    for group in range(resp.shape[1]):
        members = [user for user in user_order(resp) if resp[user].argmax() == group]
        listed = [f"{names[user]} {resp[user, group]:.2f}" for user in members[:shown]]
        listed += [f"and {len(members) - shown} more (--output lists all)"] if len(members) > shown else []
        lines.append(f"  expert {group}, {len(members)} people: {', '.join(listed) or '-'}")
    return "\n".join(lines)


class _Rows(NamedTuple):
    """What every fit reads."""

    table: ComparisonTable
    features: Float[Tensor, "N P"]
    restarts: int
    seed: int

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @property
    def group(self) -> Int[np.ndarray, "B"]:
        return latent_groups(self.table, "user")

    def fit(self, rows: np.ndarray, num_experts: int) -> ProbeResult:
        return fit_probe(
            self.features,
            torch.from_numpy(self.table.chosen[rows]),
            torch.from_numpy(self.table.rejected[rows]),
            torch.from_numpy(self.group[rows]),
            num_latent_groups(self.table, "user"),
            num_experts,
            weight=torch.from_numpy(self.table.weight[rows]),
            restarts=self.restarts,
            generator=self.generator,
        )

    def predict(self, rows: np.ndarray, fit: ProbeResult) -> np.ndarray:
        log_weights = fit.log_resp[torch.from_numpy(self.group[rows])]
        chosen, rejected = (torch.from_numpy(side[rows]) for side in (self.table.chosen, self.table.rejected))
        return probe_predict(self.features, chosen, rejected, fit.coefficients, log_weights).double().numpy()


def _compare_counts(data: _Rows, candidates: Sequence[int]) -> list[GroupCount]:
    held_out = _held_out_rows(data)
    if not held_out.any():
        return []
    losses, accuracies, agreements = [], [], []
    for num_experts in candidates:
        fit = data.fit(~held_out, num_experts)
        probability = data.predict(held_out, fit)
        losses.append(-np.log(probability))
        accuracies.append(float(((probability > 0.5) + 0.5 * (probability == 0.5)).mean()))
        agreements.append(_restart_agreement(fit))
    best = losses[int(np.argmin([loss.mean() for loss in losses]))]
    users = data.group[held_out]
    return [
        GroupCount(k, float(loss.mean()), acc, float((loss - best).mean()), _clustered_error(loss - best, users), ari)
        for k, loss, acc, ari in zip(candidates, losses, accuracies, agreements)
    ]


def _held_out_rows(data: _Rows) -> np.ndarray:
    """[B] bool: a quarter of each user's distinct pairs of texts, never all; no pair of a user on both sides."""
    table, rng = data.table, np.random.default_rng(data.seed)
    low, high = np.minimum(table.chosen, table.rejected), np.maximum(table.chosen, table.rejected)
    _, pair = np.unique(np.stack([low, high]), axis=1, return_inverse=True)
    held_out = np.zeros(len(table), bool)
    for user in np.unique(table.user[table.user >= 0]):
        rows = np.flatnonzero(table.user == user)
        pairs = rng.permutation(np.unique(pair[rows]))
        count = min(math.ceil(HELD_OUT_SHARE * len(pairs)), len(pairs) - 1)
        held_out[rows] = np.isin(pair[rows], pairs[:count])
    return held_out


def _clustered_error(difference: np.ndarray, users: np.ndarray) -> float:
    """Standard error of the mean difference, with users as the unit of sampling."""
    _, position = np.unique(users, return_inverse=True)
    sums = np.bincount(position, weights=difference - difference.mean())
    return float(np.sqrt((sums**2).sum()) / len(difference))


def _restart_agreement(fit: ProbeResult) -> float:
    if fit.log_resp.shape[1] == 1 or len(fit.restart_log_resp) < 2:
        return float("nan")
    best = fit.log_resp.argmax(dim=1).numpy()
    return float(np.mean([adjusted_rand_index(best, start.argmax(dim=1).numpy()) for start in fit.restart_log_resp]))


def _smallest_within_error(counts: Sequence[GroupCount]) -> int:
    return next(count.num_experts for count in counts if count.worse_by <= count.standard_error)


def _count_row(count: GroupCount, is_chosen: bool) -> list[str]:
    agree = "-" if math.isnan(count.restart_agreement) else f"{count.restart_agreement:.2f}"
    return [
        f"{count.num_experts}{' <- chosen' if is_chosen else ''}",
        f"{count.log_loss:.4f}",
        f"{count.accuracy:.3f}",
        "-" if count.worse_by == 0 else f"{count.worse_by:.4f} +- {count.standard_error:.4f}",
        agree,
    ]
