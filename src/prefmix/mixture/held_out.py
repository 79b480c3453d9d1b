"""Held-out log-loss of one linear Bradley-Terry reward, and the paired comparison of two such losses.

Legend: B comparisons, P features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from prefmix.mixture.linear_em import ProbeData, newton_step

FOLDS = 5
RIDGES = (4.0, 32.0, 256.0)


class Gain(NamedTuple):
    """By how much one model's held-out loss is smaller than another's.

    Attributes:
        mean: mean difference over text pairs, nats a row; positive where the second model is better.
        z: mean over its standard error; 0 where there is no spread.
    """

    mean: float
    z: float


def held_out_log_loss(
    difference: Float[Tensor, "B P"], pair: Int[Tensor, "B"], generator: torch.Generator
) -> Float[Tensor, "B"]:
    """Cross-validated -log p of every row under one linear reward fitted to the other folds.

    All rows about one pair of texts lie in one fold, since answers about the same two texts are not independent. The
    ridge is chosen on the training part of each fold, by a second split, so the losses stay unbiased.

    Args:
        difference: [B, P] f(chosen) - f(rejected).
        pair: [B] index of the unordered pair of texts.
        generator: source of the folds.
    """
    fold = _folds(pair, FOLDS, generator)
    loss = torch.full((len(difference),), math.log(2.0), dtype=difference.dtype)
    for held_out in range(FOLDS):
        train, test = fold != held_out, fold == held_out
        if not train.any() or not test.any():
            continue
        inner = train & (fold == (held_out + 1) % FOLDS)
        ridge = _inner_ridge(difference, train & ~inner, inner)
        loss[test] = softplus(-(difference[test] @ fit_linear(difference[train], ridge)))
    return loss


def fit_linear(difference: Float[Tensor, "B P"], ridge: float, steps: int = 8) -> Float[Tensor, "P"]:
    """Coefficients of one ridge-penalised linear Bradley-Terry reward, by Newton's method."""
    data = ProbeData(
        difference, torch.zeros(len(difference), dtype=torch.int64), difference.new_ones(len(difference)), 1
    )
    coefficients = difference.new_zeros(1, 1, difference.shape[1])
    resp, penalty = difference.new_ones(1, 1, 1), difference.new_full((1,), ridge)
    for _ in range(steps):
        coefficients = newton_step(data, resp, coefficients, penalty)
    return coefficients[0, 0]


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


def _inner_ridge(difference: Float[Tensor, "B P"], fit: Bool[Tensor, "B"], check: Bool[Tensor, "B"]) -> float:
    """The ridge that predicts a part of the training rows best from the rest of them."""
    if not fit.any() or not check.any():
        return RIDGES[-1]
    losses = [float(softplus(-(difference[check] @ fit_linear(difference[fit], r))).mean()) for r in RIDGES]
    return RIDGES[min(range(len(RIDGES)), key=losses.__getitem__)]


def _folds(pair: Int[Tensor, "B"], folds: int, generator: torch.Generator) -> Int[Tensor, "B"]:
    """A fold for every row, the same for all rows of a pair, of nearly equal numbers of pairs."""
    distinct, position = torch.unique(pair, return_inverse=True)
    return (torch.randperm(len(distinct), generator=generator) % folds)[position]
