"""Held-out log-loss of linear Bradley-Terry rewards, and the paired comparison of two such losses.

Legend: B comparisons, P features, C clusters of rows, S ridges.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from prefmix.mixture.linear_em import ProbeData, newton_step

FOLDS = 5
# From strong to weak: where the inner rows say nothing, the first one stays.
RIDGES = (256.0, 32.0, 4.0)


class Gain(NamedTuple):
    """By how much one model's held-out loss is smaller than another's.

    Attributes:
        mean: mean difference over text pairs, nats a row; positive where the second model is better.
        z: mean over its standard error; 0 where there is no spread.
    """

    mean: float
    z: float


def held_out_log_loss(
    difference: Float[Tensor, "B P"], pair: Int[Tensor, "B"], cluster: Int[Tensor, "B"], generator: torch.Generator
) -> Float[Tensor, "B"]:
    """Cross-validated -log p of every row under its cluster's linear reward, fitted to the other folds.

    All rows about one pair of texts lie in one fold, since answers about the same two texts are not independent. The
    ridge of a cluster is chosen on the training part of each fold, by a second split, so the losses stay unbiased.

    Args:
        difference: [B, P] f(chosen) - f(rejected).
        pair: [B] index of the unordered pair of texts.
        cluster: [B] 0..C-1; all zeros for one reward.
        generator: source of the folds.
    """
    fold = _folds(pair, FOLDS, generator)
    data = ProbeData(difference, cluster, difference.new_ones(len(difference)), int(cluster.max()) + 1)
    loss = torch.full((len(difference),), math.log(2.0), dtype=difference.dtype)
    for held_out in range(FOLDS):
        test = data.select(fold == held_out)
        train = data.select(fold != held_out)
        if len(test.group) == 0 or len(train.group) == 0:
            continue
        inner = fold == (held_out + 1) % FOLDS
        ridge = _best_ridge(data.select(~inner & (fold != held_out)), data.select(inner))
        fitted = fit_linear(train)[ridge, torch.arange(data.num_groups)]
        loss[fold == held_out] = _row_loss(test, fitted.unsqueeze(0))[0]
    return loss


def fit_linear(data: ProbeData, ridges: tuple[float, ...] = RIDGES, steps: int = 8) -> Float[Tensor, "S C P"]:
    """Coefficients of one linear Bradley-Terry reward for each ridge and cluster (`data.group`), by Newton's method."""
    num_clusters, num_features = data.num_groups, data.difference.shape[1]
    penalty = data.difference.new_tensor(ridges)
    # Each cluster is wholly its own expert's: the probe's M-step with responsibilities that are known.
    resp = torch.eye(num_clusters).to(data.difference).expand(len(ridges), -1, -1)
    coefficients = data.difference.new_zeros(len(ridges), num_clusters, num_features)
    for _ in range(steps):
        coefficients = newton_step(data, resp, coefficients, penalty)
    return coefficients


def paired_gain(first: Float[Tensor, "B"], second: Float[Tensor, "B"], pair: Int[Tensor, "B"]) -> Gain:
    """Gain of the second model over the first, with the text pair as the unit of sampling.

    Args:
        first: [B] held-out losses of the first model.
        second: [B] of the second.
        pair: [B] index of the unordered pair of texts; its rows are averaged first.
    """
    difference = (first - second).double()
    _, position = torch.unique(pair, return_inverse=True)
    count = torch.bincount(position)
    mean = torch.bincount(position, weights=difference) / count
    if len(mean) < 2 or float(mean.std()) == 0.0:
        return Gain(float(mean.mean()) if len(mean) else 0.0, 0.0)
    return Gain(float(mean.mean()), float(mean.mean() / (mean.std() / math.sqrt(len(mean)))))


def _best_ridge(fit: ProbeData, check: ProbeData) -> Int[Tensor, "C"]:
    """Index of the ridge that predicts a part of each cluster's training rows best from the rest of them."""
    if len(fit.group) == 0:
        return torch.zeros(fit.num_groups, dtype=torch.int64)
    loss = _row_loss(check, fit_linear(fit))
    by_cluster = loss.new_zeros(len(loss), fit.num_groups).index_add(1, check.group, loss)
    return by_cluster.argmin(dim=0)


def _row_loss(data: ProbeData, coefficients: Float[Tensor, "S C P"]) -> Float[Tensor, "S B"]:
    """-log p of every row under its cluster's coefficients, for each ridge."""
    return softplus(-torch.einsum("bp,sbp->sb", data.difference, coefficients[:, data.group]))


def _folds(pair: Int[Tensor, "B"], folds: int, generator: torch.Generator) -> Int[Tensor, "B"]:
    """A fold for every row, the same for all rows of a pair, of nearly equal numbers of pairs."""
    distinct, position = torch.unique(pair, return_inverse=True)
    return (torch.randperm(len(distinct), generator=generator) % folds)[position]
