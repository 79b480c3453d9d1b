"""Planted users with linear tastes, and what can be known about them at best.

    m_k = c_k . d,   p(first wins | taste k) = sigmoid(m_k),   d ~ N(0, I_8)

Legend: B comparisons, P features, U users, K tastes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefmix.mixture.linear_em import ProbeData
from prefmix.mixture.posterior import group_log_lik, posterior

FEATURES = 8
# Length of a taste: a margin's standard deviation, nats. The rule that knows everybody is right with 0.782.
SIZE = 2.06


class World(NamedTuple):
    """Tastes [K, P], the taste of each user [U], and their comparisons as (chosen - rejected)."""

    tastes: Tensor
    taste: Tensor
    data: ProbeData


class Scores(NamedTuple):
    """On fresh comparisons, under the true probabilities: mean probability of the predicted side, mean log-loss."""

    accuracy: float
    log_loss: float


def opposed_tastes(generator: torch.Generator) -> Tensor:
    """Two halves who want the opposite."""
    direction = torch.randn(FEATURES, generator=generator)
    direction = SIZE * direction / direction.norm()
    return torch.stack([direction, -direction])


def orthogonal_tastes(num: int, generator: torch.Generator) -> Tensor:
    """Tastes at right angles, in random directions."""
    basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator)).Q
    return SIZE * basis.T[:num]


def near_tastes(num: int, features: int, cosine: float, generator: torch.Generator) -> Tensor:
    """Tastes of which any two have the same cosine, in random directions of more features than usual."""
    basis = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q.T
    return SIZE * (cosine**0.5 * basis[0] + (1.0 - cosine) ** 0.5 * basis[1 : num + 1])


def draw_world(
    tastes: Tensor, users: int, each: int, generator: torch.Generator, shares: tuple[float, ...] | None = None
) -> World:
    """Users with `each` answered comparisons of every one, in equal groups or in the given shares (summing to 1)."""
    taste = torch.randperm(users, generator=generator)
    if shares is None:
        taste = taste % len(tastes)
    else:
        taste = torch.bucketize((taste + 0.5) / users, torch.tensor(shares).cumsum(0)[:-1])
    group = torch.arange(users).repeat_interleave(each)
    difference = torch.randn(users * each, tastes.shape[1], generator=generator)
    right = torch.sigmoid((difference * tastes[taste[group]]).sum(1))
    lost = torch.rand(len(right), generator=generator) > right
    difference[lost] *= -1
    return World(tastes, taste, ProbeData(difference, group, torch.ones(len(group)), users))


def user_log_weights(data: ProbeData, coefficients: Tensor, log_weights: Tensor) -> Tensor:
    """[U, K] posterior of every user from their comparisons."""
    log_lik = torch.nn.functional.logsigmoid(data.difference @ coefficients.T)
    grouped = group_log_lik(log_lik, data.group, data.num_groups, data.weight)
    return posterior(log_weights.expand(data.num_groups, -1), grouped).log_resp


def true_log_weights(world: World) -> Tensor:
    """[K] log share of users."""
    return (
        torch.bincount(world.taste, minlength=len(world.tastes)).float().log()
        - torch.tensor(float(len(world.taste))).log()
    )


def score(world: World, coefficients: Tensor, log_resp: Tensor, fresh: Tensor) -> Scores:
    """Predictions sum_k q_uk sigmoid(c_k . d) on `fresh` [U, F, P] differences, one set for each user."""
    predicted = (torch.sigmoid(fresh @ coefficients.T) * log_resp.exp().unsqueeze(1)).sum(2)
    truth = torch.sigmoid((fresh * world.tastes[world.taste].unsqueeze(1)).sum(2))
    accuracy = torch.where(predicted > 0.5, truth, 1.0 - truth).mean()
    inside = predicted.clamp(1e-12, 1 - 1e-7)
    log_loss = -(truth * inside.log() + (1.0 - truth) * (-inside).log1p()).mean()
    return Scores(float(accuracy), float(log_loss))


def row_evidence(data: ProbeData, coefficients: Tensor, log_weights: Tensor) -> float:
    """Mean over rows of sum_u log sum_k w_k prod_i p_ik, nats a row."""
    log_lik = torch.nn.functional.logsigmoid(data.difference @ coefficients.T)
    grouped = group_log_lik(log_lik, data.group, data.num_groups, data.weight)
    return float(posterior(log_weights.expand(data.num_groups, -1), grouped).log_evidence.sum()) / len(data.group)


def shape(**given: Any) -> str:
    """A cell's key in the JSON file."""
    return " ".join(f"{name}={value}" for name, value in given.items())
