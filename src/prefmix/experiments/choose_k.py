"""How many groups? Held-out users' evidence over K on the probe, with BIC, ICL and a pruning path beside it.

    evidence of a held-out user = log sum_k w_k prod_i p_ik,   mean over users, each held out once

A user is held out as a whole: what tells K = 3 from K = 2 is how a person's answers hang together, and a user of whom
some rows are known is predicted about as well by a group too many. The smallest K within one standard error of the best
wins. No fit reads true groups. Legend: B comparisons, P features, G groups (users), K experts, S starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.evaluation.metrics import adjusted_rand_index
from prefmix.experiments.effective_parameters import effective_parameters
from prefmix.experiments.prune import prune
from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.linear_em import LinearEM, ProbeData, fit_linear_em
from prefmix.mixture.posterior import group_log_lik, posterior
from prefmix.mixture.probe import choose_ridge

ANNEAL = 4.0
MIN_USERS = 8


class Candidate(NamedTuple):
    """What is known of one K.

    Attributes:
        num_experts: K.
        held_out: mean evidence of a held-out user, nats; -log 2 a row for a coin.
        worse_by: the best K's minus this one's, nats a user.
        standard_error: of that difference, over users.
        log_evidence: of all users under the fit to all, nats.
        parameters: K - 1 + sum_k tr[H_k (H_k + ridge I)^-1], H_k the curvature of expert k's log-likelihood: free
            parameters as the ridge leaves them.
        bic: log_evidence - parameters / 2 log G; larger is better (Schwarz 1978, with users as the unit).
        icl: bic - sum_g entropy of q_g (Biernacki, Celeux & Govaert 2000): larger where groups are also well apart.
        restart_agreement: mean adjusted Rand index between the best start and the others; nan for K = 1.
    """

    num_experts: int
    held_out: float
    worse_by: float
    standard_error: float
    log_evidence: float
    parameters: float
    bic: float
    icl: float
    restart_agreement: float


class Choice(NamedTuple):
    """The answer.

    Attributes:
        num_experts: the smallest K whose held-out evidence is within one standard error of the best.
        best: the K with the best held-out evidence.
        by_bic, by_icl: the K that each of them chooses.
        by_pruning: the K where merging experts, from the largest K downwards, has the best BIC.
        candidates: one entry for each K that was tried, by rising K.
        ridge: precision of the coefficients' prior in all fits.
        num_users: users with rows.
    """

    num_experts: int
    best: int
    by_bic: int
    by_icl: int
    by_pruning: int
    candidates: list[Candidate]
    ridge: float
    num_users: int


def choose_k(
    data: ProbeData,
    candidates: Sequence[int] = tuple(range(1, 9)),
    *,
    ridge: float | None = None,
    folds: int = 4,
    restarts: int = 2,
    max_steps: int = 40,
    patience: int | None = 3,
    seed: int = 0,
) -> Choice:
    """Searches over K, upwards.

    Args:
        data: comparisons as feature differences; groups are users.
        candidates: values of K.
        ridge: precision of the coefficients' prior, one for all K so that they differ in K alone; None: chosen on
            held-out users with a small number of groups (the candidate at a third of the list).
        folds: of the users.
        restarts: starts of each fit; the best penalised evidence is kept.
        max_steps: EM steps of each fit.
        patience: stop after so many K in a row that are worse than the best by more than one standard error; None
            tries all. The largest K cost most, and tell least where few groups are enough.
        seed: of folds and starts.

    Raises:
        ValueError: candidates that are none, or too few users to hold some out.
    """
    counts = sorted(set(candidates))
    users = torch.unique(data.group)
    if not counts or counts[0] < 1:
        raise ValueError(f"candidates={list(candidates)}: name numbers of groups, each at least 1")
    if len(users) < max(MIN_USERS, folds):
        raise ValueError(
            f"{len(users)} users are too few to choose the number of groups by users that are held out; have at least "
            f"{max(MIN_USERS, folds)}, or set num_experts yourself"
        )
    generator = torch.Generator().manual_seed(seed)
    if ridge is None:
        ridge = choose_ridge(data, counts[len(counts) // 3], anneal=ANNEAL, generator=generator, starts=1)
    fold = _fold_of_groups(users, data.num_groups, folds, generator)
    search = _Search(data, users, fold, folds, ridge, restarts, max_steps, generator)
    evidence: list[Tensor] = []
    for k in counts:
        evidence.append(search.held_out(k))
        if _hopeless(evidence, patience):
            break
    counts = counts[: len(evidence)]
    fits = [search.fit(data, k) for k in counts]
    best = max(range(len(counts)), key=lambda i: float(evidence[i].mean()))
    found = [_candidate(data, fit, evidence[best] - own, own, ridge) for fit, own in zip(fits, evidence)]
    return Choice(
        num_experts=next(c.num_experts for c in found if c.worse_by <= c.standard_error),
        best=counts[best],
        by_bic=max(found, key=lambda c: c.bic).num_experts,
        by_icl=max(found, key=lambda c: c.icl).num_experts,
        by_pruning=prune(data, fits[-1], ridge),
        candidates=found,
        ridge=ridge,
        num_users=len(users),
    )


class _Search(NamedTuple):
    """What all fits share."""

    data: ProbeData
    users: Int[Tensor, "U"]
    fold: Int[Tensor, "G"]
    folds: int
    ridge: float
    restarts: int
    max_steps: int
    generator: torch.Generator

    def fit(self, data: ProbeData, num_experts: int) -> LinearEM:
        """Several starts, the best first."""
        starts = 1 if num_experts == 1 else self.restarts
        ridge = torch.full((starts,), self.ridge)
        fit = fit_linear_em(
            data, num_experts, ridge, anneal=ANNEAL, generator=self.generator, max_steps=self.max_steps, tolerance=1e-6
        )
        order = fit.penalised.argsort(descending=True)
        return fit._replace(
            log_resp=fit.log_resp[order],
            log_weights=fit.log_weights[order],
            coefficients=fit.coefficients[order],
            log_evidence=fit.log_evidence[order],
            penalised=fit.penalised[order],
        )

    def held_out(self, num_experts: int) -> Float[Tensor, "U"]:
        """Evidence of every user under the fit to the other folds."""
        found = self.data.difference.new_zeros(self.data.num_groups)
        for held_out in range(self.folds):
            is_test = self.fold[self.data.group] == held_out
            fit = self.fit(self.data.select(~is_test), num_experts)
            found += new_user_evidence(self.data.select(is_test), fit.log_weights[0], fit.coefficients[0])
        return found[self.users].double()


def new_user_evidence(
    data: ProbeData, log_weights: Float[Tensor, "K"], coefficients: Float[Tensor, "K P"]
) -> Float[Tensor, "G"]:
    """Evidence log sum_k w_k prod_i p_ik of users that the fit has not seen, nats; 0 for groups without rows."""
    log_lik = preference_log_lik(data.difference @ coefficients.T)
    grouped = group_log_lik(log_lik, data.group, data.num_groups, data.weight)
    return posterior(log_weights.expand(data.num_groups, -1), grouped).log_evidence


def _hopeless(evidence: list[Tensor], patience: int | None) -> bool:
    """Whether the last `patience` K are all worse than the best one, each by more than its standard error."""
    best = max(range(len(evidence)), key=lambda i: float(evidence[i].mean()))
    if patience is None or len(evidence) - 1 - best < patience:
        return False
    worse = [evidence[best] - own for own in evidence[-patience:]]
    return all(float(w.mean()) > float(w.std()) / math.sqrt(len(w)) for w in worse)


def _candidate(
    data: ProbeData, fit: LinearEM, worse: Float[Tensor, "U"], held_out: Float[Tensor, "U"], ridge: float
) -> Candidate:
    resp = fit.log_resp[0].exp()
    num_users = len(worse)
    parameters = effective_parameters(data, resp, fit.coefficients[0], ridge)
    evidence = float(new_user_evidence(data, fit.log_weights[0], fit.coefficients[0]).double().sum())
    filled = torch.bincount(data.group, minlength=data.num_groups) > 0
    entropy = float(-(resp * fit.log_resp[0]).nan_to_num(nan=0.0)[filled].double().sum())
    bic = evidence - 0.5 * parameters * math.log(num_users)
    return Candidate(
        num_experts=resp.shape[1],
        held_out=float(held_out.mean()),
        worse_by=float(worse.mean()),
        standard_error=float(worse.std(unbiased=True) / math.sqrt(num_users)),
        log_evidence=evidence,
        parameters=parameters,
        bic=bic,
        icl=bic - entropy,
        restart_agreement=_restart_agreement(fit, filled),
    )


def _restart_agreement(fit: LinearEM, filled: Tensor) -> float:
    labels = fit.log_resp[:, filled].argmax(dim=2).numpy()
    if len(labels) < 2:
        return float("nan")
    return sum(adjusted_rand_index(labels[0], other) for other in labels[1:]) / (len(labels) - 1)


def _fold_of_groups(
    users: Int[Tensor, "U"], num_groups: int, folds: int, generator: torch.Generator
) -> Int[Tensor, "G"]:
    fold = torch.zeros(num_groups, dtype=torch.int64)
    fold[users[torch.randperm(len(users), generator=generator)]] = torch.arange(len(users)) % folds
    return fold
