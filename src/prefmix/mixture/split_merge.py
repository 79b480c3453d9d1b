"""Split and merge: leaves a local optimum of EM by making one expert of two that agree and two of one that does not.

A fit with one group shared by two experts and two groups squeezed into one cannot repair itself by EM. Each candidate
names two experts to merge and a third to split, along the direction in which its own groups pull apart; EM runs from
each, and the best penalised evidence wins, so a round never makes the fit worse.

Legend: B comparisons, P features, G groups, K experts, C candidates. Source: Ueda, Nakano, Ghahramani & Hinton 2000.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.linear_em import WEIGHT_CONCENTRATION, LinearEM, ProbeData, fit_linear_em
from prefmix.mixture.posterior import group_log_lik

MAX_CANDIDATES = 6
# Share of its responsibility that a split expert keeps on the wrong side: EM must be able to undo the split.
LEAK = 0.1


class Candidate(NamedTuple):
    """Experts `merge` become one, and expert `split` becomes two."""

    merge: tuple[int, int]
    split: int


def split_and_merge(
    data: ProbeData,
    fit: LinearEM,
    ridge: float,
    *,
    rounds: int = 4,
    max_steps: int = 200,
    weight_concentration: float = WEIGHT_CONCENTRATION,
    pooling: float | None = None,
) -> LinearEM:
    """Improves the best start of a fit until no candidate raises its penalised evidence.

    Args:
        data: the comparisons that were fitted.
        fit: any number of starts.
        ridge: precision of the coefficients' prior that was used.
        rounds: times that all candidates are tried, at most.
        max_steps: EM steps of a candidate.
        weight_concentration: of the weights' prior that was used.
        pooling: of the coefficients' prior that was used (`linear_em`); None: 0.

    Returns:
        One start (S = 1), with at least the penalised evidence of the best given. Fits of fewer than three experts
        come back as they are: merging the only two leaves nothing to split.
    """
    best = keep_start(fit, int(fit.penalised.argmax()))
    for _ in range(rounds if best.coefficients.shape[1] >= 3 else 0):
        resp, coefficients = best.log_resp[0].exp(), best.coefficients[0]
        halves = split_halves(data, resp, coefficients)
        starts = torch.stack([_start(resp, halves, candidate) for candidate in candidates(resp, halves)])
        tried = fit_linear_em(
            data, len(coefficients), torch.full((len(starts),), ridge), anneal=1.0, anneal_steps=0,
            generator=torch.Generator().manual_seed(0), max_steps=max_steps, first_resp=starts,
            weight_concentration=weight_concentration,
            pooling=None if pooling is None else torch.full((len(starts),), pooling),
        )  # fmt: skip
        winner = int(tried.penalised.argmax())
        if tried.penalised[winner] <= best.penalised[0] + 1e-4:
            break
        best = keep_start(tried, winner)
    return best


def keep_start(fit: LinearEM, start: int) -> LinearEM:
    """One start of several."""
    log_resp, log_weights, coefficients, log_evidence, penalised = (part[start : start + 1] for part in fit[:5])
    return LinearEM(log_resp, log_weights, coefficients, log_evidence, penalised, fit.trace[:, start : start + 1])


def split_halves(
    data: ProbeData, resp: Float[Tensor, "G K"], coefficients: Float[Tensor, "K P"]
) -> Float[Tensor, "G K"]:
    """Where each group lies along the axis on which an expert's groups pull apart most; its sign is the half.

        score_gk = sum_{i of g} a_i (1 - p_ik) d_i / sqrt(n_g),   the axis: leading eigenvector of
        sum_g q_gk score_gk score_gk^T

    At the expert's optimum the q-weighted scores sum to the ridge's pull, so groups that agree scatter as noise does.
    """
    count = torch.bincount(data.group, minlength=data.num_groups).clamp(min=1).sqrt().unsqueeze(1)
    sides = []
    for q, c in zip(resp.T, coefficients):
        pull = (data.weight * torch.sigmoid(-(data.difference @ c))).unsqueeze(1) * data.difference
        score = group_log_lik(pull, data.group, data.num_groups) / count
        score = score - (q.unsqueeze(1) * score).sum(dim=0) / q.sum().clamp(min=1e-12)
        axis = torch.linalg.eigh(score.T @ (q.unsqueeze(1) * score)).eigenvectors[:, -1]
        sides.append(score @ axis)
    return torch.stack(sides, dim=1)


def candidates(resp: Float[Tensor, "G K"], halves: Float[Tensor, "G K"]) -> list[Candidate]:
    """At most MAX_CANDIDATES: pairs that share groups (or hold few) first, and the experts that scatter most.

    The order of pairs is by overlap sum_g q_gj q_gk over the smaller of the two, of splits by the mean square of
    `halves`.
    """
    num_experts = resp.shape[1]
    usage = resp.sum(dim=0).clamp(min=1e-12)
    pairs = [(j, k) for j in range(num_experts) for k in range(j + 1, num_experts)]
    shared = {(j, k): float(resp[:, j] @ resp[:, k] / torch.minimum(usage[j], usage[k])) for j, k in pairs}
    scatter = ((resp * halves.square()).sum(dim=0) / usage).tolist()
    by_scatter = sorted(range(num_experts), key=lambda k: -scatter[k])
    by_overlap = sorted(pairs, key=lambda pair: -shared[pair])
    rank = {pair: place for place, pair in enumerate(by_overlap)}
    place = {expert: position for position, expert in enumerate(by_scatter)}
    every = [Candidate(pair, expert) for pair in pairs for expert in range(num_experts) if expert not in pair]
    return sorted(every, key=lambda c: rank[c.merge] + place[c.split])[:MAX_CANDIDATES]


def _start(resp: Float[Tensor, "G K"], halves: Float[Tensor, "G K"], candidate: Candidate) -> Float[Tensor, "G K"]:
    """Responsibilities after a candidate: the first of the merged takes both, the second half of the split expert."""
    (first, second), split = candidate
    upper = halves[:, split] > 0
    moved = resp[:, split] * torch.where(upper, 1.0 - LEAK, LEAK)
    started = resp.clone()
    started[:, first] = resp[:, first] + resp[:, second]
    started[:, second] = moved
    started[:, split] = resp[:, split] - moved
    return started
