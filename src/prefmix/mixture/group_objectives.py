"""Weights for somebody about whom nothing is known: good on average, for the worst group, or without much regret.

The first two read log-likelihoods of comparisons, [B, K], and the groups that made them; the other two read what each
type of person gets from each expert's responses, [J, K], and are matrix games, solved exactly. All return K weights
that a policy takes as they are (`MixturePolicy.generate(weights=...)`).

Legend: B comparisons, G groups, J types of people, K experts, T rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.posterior import group_log_lik

_TOLERANCE = 1e-11


class UnknownUserWeights(NamedTuple):
    """Weights, and what they promise.

    Attributes:
        weights: [K] w >= 0, sum 1.
        value: what was made best: log-likelihood a comparison (nats), or reward.
        adversary: how much each group (type) counts against these weights; sums to 1. All of it lies on the worst.
        gap: how far `value` may be from the best one; 0 where the solution is exact.
    """

    weights: Float[Tensor, "K"]
    value: float
    adversary: Float[Tensor, "_"]
    gap: float


def average_weights(
    log_lik: Float[Tensor, "B K"],
    group: Int[Tensor, "B"],
    num_groups: int,
    *,
    max_steps: int = 5000,
    tolerance: float = 1e-8,
) -> UnknownUserWeights:
    """Best for the average group: max_w 1/G sum_g F_g(w), F_g(w) = mean_{i of g} log sum_k w_k p_ik.

    A group counts once, however many comparisons it made. The objective is concave; EM raises it in every step, and
    its largest gradient less 1 bounds what is missing (duality).

    Args:
        log_lik: [B, K] log p_ik of the comparisons, nats.
        group: [B] 0..G-1, a user or a group of users; every group has comparisons.
        num_groups: G.
        max_steps: EM steps at most.
        tolerance: gap at which to stop, nats.

    Raises:
        ValueError: a group without comparisons.
    """
    rows = _GroupedRows.of(log_lik, group, num_groups)
    each = rows.share.new_full((num_groups,), 1.0 / num_groups)
    weights, gap = _best_for(rows, each, None, max_steps, tolerance)
    return UnknownUserWeights(weights, float(each @ rows.fares(weights)), each, gap)


def worst_group_weights(
    log_lik: Float[Tensor, "B K"],
    group: Int[Tensor, "B"],
    num_groups: int,
    *,
    rounds: int = 3000,
    step: float = 2.0,
) -> UnknownUserWeights:
    """Best for the worst group (group DRO): max_w min_g F_g(w), F_g as in `average_weights`.

    The adversary moves to groups that fare badly, c_g proportional to c_g exp(-eta_t F_g(w)), eta_t = step / sqrt(t)
    (exponentiated weights), and w takes an EM step for those counts. The mean of w over the rounds is returned; its
    worst group against the best that any weights reach under the mean adversary is the gap.

    Args:
        log_lik: [B, K] log p_ik of the comparisons, nats.
        group: [B] 0..G-1; every group has comparisons.
        num_groups: G.
        rounds: T.
        step: eta_1, per nat.

    Raises:
        ValueError: a group without comparisons.

    Source: Sagawa et al. 2020 (arXiv 1911.08731), algorithm 1, with all groups in every round instead of sampled ones.
    """
    rows = _GroupedRows.of(log_lik, group, num_groups)
    weights = rows.chance.new_full((rows.chance.shape[1],), 1.0 / rows.chance.shape[1])
    log_counts = rows.share.new_zeros(num_groups)
    sums = torch.zeros_like(weights), torch.zeros_like(log_counts)
    for t in range(1, rounds + 1):
        log_counts = worse_groups_gain(log_counts, -rows.fares(weights), step / t**0.5)
        counts = log_counts.exp()
        weights, _ = _best_for(rows, counts, weights, 1, 0.0)
        sums = sums[0] + t * weights, sums[1] + t * counts  # late rounds are nearer to the solution: they count more
    weights, counts = (part / part.sum() for part in sums)
    value = float(rows.fares(weights).min())
    best, missing = _best_for(rows, counts, weights, 5000, 1e-8)
    return UnknownUserWeights(weights, value, counts, max(float(counts @ rows.fares(best)) + missing - value, 0.0))


def worse_groups_gain(log_counts: Float[Tensor, "G"], loss: Float[Tensor, "G"], step: float) -> Float[Tensor, "G"]:
    """The adversary's move, [G] log of c_g exp(eta L_g) / sum_h c_h exp(eta L_h): groups that fare worse count more.

    Args:
        log_counts: [G] log c_g.
        loss: [G] L_g, nats.
        step: eta, per nat.

    Source: exponentiated gradient (Kivinen & Warmuth 1997), as in Sagawa et al. 2020, algorithm 1.
    """
    return torch.log_softmax(log_counts + step * loss, dim=0)


def max_min_weights(utility: Float[Tensor, "J K"]) -> UnknownUserWeights:
    """Best for the type that fares worst: max_w min_j sum_k w_k U_jk.

    Args:
        utility: [J, K] U_jk, what type j gets from expert k (mean reward of its responses, say). With J = K types, one
            for each expert, this is max-min over experts.

    Source: von Neumann's minimax theorem; for reward models of groups, Chakraborty et al. 2024 (arXiv 2402.08925).
    """
    return _solve_game(utility.double())


def min_max_regret_weights(utility: Float[Tensor, "J K"]) -> UnknownUserWeights:
    """Best against regret: min_w max_j [max_k U_jk - sum_k w_k U_jk]; `value` is minus the largest regret.

    Types that no expert serves well do not dominate, as they do under `max_min_weights`.

    Args:
        utility: [J, K] U_jk, as for `max_min_weights`.

    Source: Savage 1951.
    """
    utility = utility.double()
    return _solve_game(utility - utility.amax(dim=1, keepdim=True))


class _GroupedRows(NamedTuple):
    """Comparisons of groups; `chance` is p_ik over the row's largest, so that nothing underflows."""

    chance: Float[Tensor, "B K"]
    peak: Float[Tensor, "B"]
    group: Int[Tensor, "B"]
    share: Float[Tensor, "G"]

    @classmethod
    def of(cls, log_lik: Tensor, group: Tensor, num_groups: int) -> _GroupedRows:
        size = torch.bincount(group, minlength=num_groups)
        if bool((size == 0).any()):
            empty = (size == 0).nonzero().flatten()[:5].tolist()
            raise ValueError(f"groups {empty} have no comparisons; leave them out and count the others from 0")
        peak = log_lik.double().amax(dim=1)
        return cls(torch.exp(log_lik.double() - peak.unsqueeze(1)), peak, group, 1.0 / size.double())

    def fares(self, weights: Float[Tensor, "K"]) -> Float[Tensor, "G"]:
        """F_g(w), nats."""
        log_lik = (torch.log(self.chance @ weights) + self.peak) * self.share[self.group]
        return group_log_lik(log_lik.unsqueeze(1), self.group, len(self.share)).squeeze(1)


def _best_for(
    rows: _GroupedRows, counts: Float[Tensor, "G"], start: Tensor | None, max_steps: int, tolerance: float
) -> tuple[Float[Tensor, "K"], float]:
    """EM for max_w sum_g c_g F_g(w): the weights, and how much is missing at most, nats."""
    row_counts = (counts * rows.share)[rows.group]
    num_experts = rows.chance.shape[1]
    weights = rows.chance.new_full((num_experts,), 1.0 / num_experts) if start is None else start
    gap = torch.inf
    for _ in range(max_steps):
        # Gradient in w: sum_i c_i p_ik / sum_j w_j p_ij; its mean under w is 1.
        gradient = (row_counts / (rows.chance @ weights)) @ rows.chance
        gap = float(gradient.max()) - 1.0
        if gap <= tolerance:
            break
        weights = weights * gradient
        weights = weights / weights.sum()
    return weights, max(gap, 0.0)


def _solve_game(utility: Float[Tensor, "J K"]) -> UnknownUserWeights:
    """max_w min_j (U w)_j by the simplex method, exactly, with Bland's rule against cycles.

    Scaled to A in [1, 2], the game is the linear program max sum y, A' y <= 1, y >= 0; y is the adversary's mix and the
    prices of the constraints are w, both up to scale (Dantzig 1951).
    """
    num_types, num_experts = utility.shape
    low = utility.min()
    scale = (utility.max() - low).clamp_min(1e-300)
    ones = utility.new_ones(num_experts, 1)
    rows = torch.cat([((utility - low) / scale + 1.0).T, torch.eye(num_experts, dtype=utility.dtype), ones], dim=1)
    price = torch.cat([-utility.new_ones(num_types), utility.new_zeros(num_experts + 1)])
    basis = list(range(num_types, num_types + num_experts))
    while bool((price[:-1] < -_TOLERANCE).any()):
        enters = int((price[:-1] < -_TOLERANCE).nonzero()[0])
        column = rows[:, enters]
        ratio = torch.where(column > _TOLERANCE, rows[:, -1] / column.clamp_min(_TOLERANCE), torch.inf)
        nearest = (ratio <= ratio.min() + _TOLERANCE).nonzero().flatten().tolist()
        leaves = min(nearest, key=lambda row: basis[row])
        rows[leaves] = rows[leaves] / rows[leaves, enters]
        others = torch.arange(num_experts) != leaves
        rows[others] = rows[others] - rows[others, enters].unsqueeze(1) * rows[leaves]
        price = price - price[enters] * rows[leaves]
        basis[leaves] = enters
    found = utility.new_zeros(num_types + num_experts)
    found[basis] = rows[:, -1]
    weights = price[num_types:-1].clamp_min(0.0)
    weights, adversary = weights / weights.sum(), found[:num_types] / found[:num_types].sum()
    value = (utility @ weights).min()
    gap = float((adversary @ utility).max() - value)
    return UnknownUserWeights(weights, float(value), adversary, max(gap, 0.0))
