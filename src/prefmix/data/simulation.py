"""People with known tastes over known texts: who prefers what is planted, so the best possible answer can be computed.

    r_k(y) = scale * v_k . f(y),   v_k unit directions of taste,   m_k = r_k(first) - r_k(second)

A user has one taste (discrete groups), or a share of each, drawn from a Dirichlet distribution (continuous groups). The
truth goes into a file of its own: nothing that fits reads it. Legend: N texts, P attributes, B comparisons, U users,
K tastes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.simulated_texts import TextPool
from prefmix.data.simulation_options import SimulationOptions


class Judged(NamedTuple):
    """Comparisons as they were asked and answered.

    Attributes:
        first, second: [B] the two texts, in the order of asking.
        user: [B] who was asked.
        difference: [B, P] f(first) - f(second).
        margins: [B, K] true margin of each taste, first against second, nats.
        answer: [B] +1 for the first, -1 for the second, 0 for a tie.
    """

    first: np.ndarray
    second: np.ndarray
    user: np.ndarray
    difference: np.ndarray
    margins: np.ndarray
    answer: np.ndarray


class Simulated(NamedTuple):
    """A simulated data set and its truth.

    Attributes:
        options: what was planted.
        seed: of every draw.
        tastes: [K, P] scale * v_k.
        weights: [U, K] each user's share of each taste, new users last; one-hot for discrete groups.
        users: U names.
        judged: split -> comparisons.
        pools: split -> its texts.
    """

    options: SimulationOptions
    seed: int
    tastes: np.ndarray
    weights: np.ndarray
    users: tuple[str, ...]
    judged: dict[str, Judged]
    pools: dict[str, TextPool]

    def rows(self, split: str, *, with_group: bool = False) -> list[dict[str, Any]]:
        """Preference rows of a split, as every reader of this package takes them; ties are marked, not left out.

        Args:
            split: `train`, `test` or `new_users`.
            with_group: also a `group` column (the largest share), which evaluation compares with and
                `init="labels"` reads.
        """
        pool, judged, found = self.pools[split], self.judged[split], []
        for first, second, user, answer in zip(*(column.tolist() for column in judged[:3]), judged.answer.tolist()):
            chosen, rejected = (second, first) if answer < 0 else (first, second)
            row = {"prompt": pool.prompts[pool.prompt_of[first]]}
            row |= {"chosen": pool.texts[chosen], "rejected": pool.texts[rejected], "user": self.users[user]}
            row |= {"tie": True} if answer == 0 else {}
            row |= {"group": f"taste {self.weights[user].argmax()}"} if with_group else {}
            found.append(row)
        return found

    def truth(self) -> dict[str, Any]:
        """JSON form of everything that was planted."""
        return {
            "options": asdict(self.options),
            "seed": self.seed,
            "attributes": list(self.pools["train"].names),
            "tastes": self.tastes.tolist(),
            "weights": dict(zip(self.users, self.weights.tolist())),
        }


def simulate(pools: Mapping[str, TextPool], options: SimulationOptions, seed: int = 0) -> Simulated:
    """Draws tastes, users and answers.

    Args:
        pools: texts of `train` and `test`, disjoint; new users judge texts of `test`.
        options: what to plant.
        seed: of everything that is drawn.

    Raises:
        ValueError: an option that cannot be met.
    """
    pool = pools["train"]
    options.check(len(pool.names))
    rng = np.random.default_rng([seed, 17])
    tastes = options.scale * taste_directions(options, pool.directions(rng))
    num_users = options.num_users + options.num_new_users
    weights = np.concatenate([_user_weights(options, n, rng) for n in (options.num_users, options.num_new_users)])
    digits = max(3, len(str(num_users - 1)))
    known, new = np.arange(options.num_users), np.arange(options.num_users, num_users)
    plan = {
        "train": (pools["train"], known, options.comparisons_per_user),
        "test": (pools["test"], known, options.test_per_user),
        "new_users": (pools["test"], new, 2 * options.test_per_user),
    }
    judged = {
        split: _judge(texts, np.repeat(users, each), weights, tastes, options, rng)
        for split, (texts, users, each) in plan.items()
    }
    names = tuple(f"u{index:0{digits}d}" for index in range(num_users))
    return Simulated(options, seed, tastes, weights, names, judged, {split: entry[0] for split, entry in plan.items()})


def taste_directions(options: SimulationOptions, directions: np.ndarray) -> np.ndarray:
    """[K, P] unit vectors v_k from orthonormal `directions` [P, P], as `options.layout` says."""
    groups = options.num_groups
    if options.layout == "opposed":
        return np.stack([directions[k // 2] * (-1.0) ** k for k in range(groups)])
    if options.layout == "orthogonal" or groups == 1:
        return directions[:groups]
    return np.sqrt(options.cosine) * directions[0] + np.sqrt(1.0 - options.cosine) * directions[1 : groups + 1]


def outcome_log_probs(margin: np.ndarray, options: SimulationOptions) -> np.ndarray:
    """Log probabilities of first, second and tie, [3, ...], of margins under one taste; noise included.

    p_tie = nu / (e^{m/2} + e^{-m/2} + nu),   p_first = e^{m/2} / (...)      (Davidson 1970)
    """
    half = 0.5 * margin
    nothing = np.full_like(half, np.log(options.ties) if options.ties > 0 else -np.inf)
    total = np.logaddexp(np.logaddexp(half, -half), nothing)
    first, second = half - total, -half - total
    if options.noise > 0:
        keep, turn = np.log1p(-options.noise), np.log(options.noise)
        first, second = np.logaddexp(keep + first, turn + second), np.logaddexp(keep + second, turn + first)
    return np.stack([first, second, nothing - total])


def _user_weights(options: SimulationOptions, count: int, rng: np.random.Generator) -> np.ndarray:
    if options.alpha is not None:
        return rng.dirichlet(np.full(options.num_groups, options.alpha), size=count)
    return np.eye(options.num_groups)[rng.permutation(count) % options.num_groups]


def _judge(
    pool: TextPool,
    user: np.ndarray,
    weights: np.ndarray,
    tastes: np.ndarray,
    options: SimulationOptions,
    rng: np.random.Generator,
) -> Judged:
    first, second = pool.draw_pairs(len(user), rng)
    difference = pool.attributes[first] - pool.attributes[second]
    margins = difference @ tastes.T
    if options.combination == "log_linear":
        margin = (weights[user] * margins).sum(axis=1)
    else:
        # One taste judges each comparison: the user's only one, or one drawn by the user's shares.
        cumulative = weights[user].cumsum(axis=1)
        taste = (rng.random(len(user))[:, None] > cumulative[:, :-1]).sum(axis=1)
        margin = np.take_along_axis(margins, taste[:, None], axis=1)[:, 0]
    log_probs = outcome_log_probs(margin, options)
    # The largest of log p + Gumbel noise is a draw from p.
    outcome = (log_probs + rng.gumbel(size=log_probs.shape)).argmax(axis=0)
    return Judged(first, second, user, difference, margins, np.array([1, -1, 0])[outcome])
