"""Preferences that no single Bradley-Terry reward can have, and how well one reward or any mixture of them can do.

Legend: n items, P pairs, R = n! rankings, K experts. Losses are nats a comparison, all pairs equally often.
"""

from __future__ import annotations

from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog, minimize

from prefmix.mixture.group_objectives import average_weights

ITEMS = 3
PAIRS = ((0, 1), (1, 2), (2, 0))  # in this direction the three wins of a cycle


class World(NamedTuple):
    """What a population answers, as exact counts: every loss here is an expectation, no row was sampled.

    Attributes:
        name: in tables.
        wins: [P] how often the first item of each pair of PAIRS wins, out of `of`.
        of: answers to each pair.
    """

    name: str
    wins: tuple[int, int, int]
    of: int

    @property
    def chance(self) -> np.ndarray:
        """[P] probability that the first item wins."""
        return np.array(self.wins) / self.of


def cycle(wins: int, of: int) -> World:
    """A beats B, B beats C and C beats A, each with probability p = wins / of."""
    return World(f"cycle, p = {wins}/{of}", (wins, wins, wins), of)


# Half of the people put A above all else, half below; all prefer B to C. No taste is odd, and no one reward has both.
POLARISING = World("one loved or hated", (5, 9, 5), 10)
WORLDS = (cycle(3, 5), cycle(2, 3), cycle(9, 10), POLARISING)


def cross_entropy(chance: np.ndarray, predicted: np.ndarray) -> float:
    """- mean over pairs of p log q + (1 - p) log(1 - q); 0 log 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(p == 0, 0.0, p * np.log(q)) for p, q in ((chance, predicted), (1 - chance, 1 - predicted))]
    return float(-(terms[0] + terms[1]).mean())


def entropy(world: World) -> float:
    """Nobody can do better: the mean binary entropy of the answers."""
    return cross_entropy(world.chance, world.chance)


def margins(rewards: np.ndarray) -> np.ndarray:
    """[..., P] reward differences of PAIRS from rewards [..., n]."""
    return np.stack([rewards[..., i] - rewards[..., j] for i, j in PAIRS], axis=-1)


def single_floor(world: World) -> float:
    """Minimum over rewards of the cross-entropy of Bradley-Terry: convex, so a local minimum is the minimum."""

    def loss(rewards: np.ndarray) -> tuple[float, np.ndarray]:
        margin = margins(rewards)
        p = world.chance
        slope = (1 / (1 + np.exp(-margin)) - p) / len(PAIRS)
        gradient = np.zeros(ITEMS)
        for (i, j), s in zip(PAIRS, slope, strict=True):
            gradient[i] += s
            gradient[j] -= s
        value = (p * np.logaddexp(0, -margin) + (1 - p) * np.logaddexp(0, margin)).mean()
        return float(value), gradient

    start = np.array([0.3, -0.2, 0.1])
    return float(minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-10}).fun)


class Floor(NamedTuple):
    """A minimum and what is proved of it.

    Attributes:
        value: a loss that is reached (in the limit).
        gap: the true minimum is at most so far below.
    """

    value: float
    gap: float


def random_utility_floor(world: World) -> Floor:
    """Minimum over distributions on rankings of the cross-entropy: the infimum over mixtures of any K experts.

    The objective is concave in the distribution; `average_weights` bounds what is missing by duality.
    """
    agrees = rankings_agree()
    rows = np.concatenate([np.repeat(agrees, world.wins, 0), np.repeat(~agrees, world.of - np.array(world.wins), 0)])
    log_lik = torch.from_numpy(np.where(rows, 0.0, -np.inf))
    found = average_weights(log_lik, torch.zeros(len(rows), dtype=torch.long), 1, max_steps=20_000, tolerance=1e-9)
    return Floor(-found.value, found.gap)


def largest_cycle() -> float:
    """The smallest of P(A > B), P(B > C), P(C > A), maximised over distributions on rankings by linear programming."""
    agrees = rankings_agree().astype(float)
    ranks = agrees.shape[1]
    # Variables: q [R], t. Maximise t subject to A q >= t, sum q = 1.
    found = linprog(
        np.r_[np.zeros(ranks), -1.0],
        A_ub=np.c_[-agrees, np.ones(len(PAIRS))],
        b_ub=np.zeros(len(PAIRS)),
        A_eq=np.r_[np.ones(ranks), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * (ranks + 1),
    )
    return float(-found.fun)


def lowest_mixture(world: World, num_experts: int, starts: int = 60, seed: int = 0) -> float:
    """The lowest loss that K Bradley-Terry experts with free weights were *found* to reach: no bound from below."""
    rng = np.random.default_rng(seed)

    def loss(parameters: np.ndarray) -> float:
        rewards, logits = parameters[:-num_experts].reshape(num_experts, ITEMS), parameters[-num_experts:]
        weights = np.exp(logits - np.logaddexp.reduce(logits))
        predicted = weights @ (1 / (1 + np.exp(-np.clip(margins(rewards), -40, 40))))
        return cross_entropy(world.chance, np.clip(predicted, 1e-12, 1 - 1e-12))

    size = num_experts * (ITEMS + 1)
    return min(float(minimize(loss, rng.normal(scale=2, size=size), method="L-BFGS-B").fun) for _ in range(starts))


def rankings_agree() -> np.ndarray:
    """[P, R] whether each ranking puts the first item of each pair first."""
    orders = list(permutations(range(ITEMS)))
    return np.array([[order.index(i) < order.index(j) for order in orders] for i, j in PAIRS])


assert {frozenset(pair) for pair in PAIRS} == {frozenset(pair) for pair in combinations(range(ITEMS), 2)}
