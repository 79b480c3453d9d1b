"""All policies of one seed write to the same evaluation prompts; what they wrote becomes arrays.

Legend: P prompts, n responses for each, N = P n, S strengths, R rewards, K experts in the order of objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from products import logit_scale, product_grid, product_name

from prefmix.evaluation.generation_quality import Samples, language_figures, reward_columns, sample_responses
from prefmix.evaluation.rewards import Reward
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.modular import soup
from prefmix.policy.strength import at_strength

Say = Callable[[str], None]


class Writing(NamedTuple):
    """How responses are drawn.

    Attributes:
        prompts: P evaluation prompts.
        each: n.
        max_new_tokens: longest response.
        strengths: S multiples of what was learned, rising; 1 is among them.
        seed: of the draws.
    """

    prompts: Sequence[str]
    each: int
    max_new_tokens: int
    strengths: Sequence[float]
    seed: int


class Judge:
    """Samples policies and keeps rewards [N, R], log-ratios [N, K] and figures of language, by name."""

    def __init__(self, writing: Writing, rewards: Mapping[str, Reward], say: Say) -> None:
        self.writing, self.rewards, self._say = writing, rewards, say
        self.arrays: dict[str, np.ndarray] = {}
        self.language: dict[str, dict[str, float]] = {}
        self.examples: dict[str, list[str]] = {}

    def take(self, name: str, samples: Samples, order: Sequence[int] = ()) -> None:
        """Keeps what is reported of these samples; `order` are the experts whose log-ratios are kept."""
        columns = reward_columns(samples, self.rewards)
        self.arrays[f"{name}/rewards"] = columns
        self.arrays[f"{name}/log_ratio"] = samples.log_ratio
        if order:
            self.arrays[f"{name}/expert_log_ratio"] = (samples.expert_log_probs - samples.ref_log_probs[:, None])[
                :, list(order)
            ]
        self.language[name] = {k: round(v, 4) for k, v in language_figures(samples)._asdict().items()}
        self.examples[name] = samples.responses[:: samples.each][:3]
        means = ", ".join(f"{k} {v:.2f}" for k, v in zip(self.rewards, columns.mean(axis=0), strict=True))
        self._say(f"{name}: KL {samples.log_ratio.mean():.2f} nats; {means}")

    def write(
        self, name: str, policy: MixturePolicy, weights: Sequence[float], order: Sequence[int] = (), **options: Any
    ) -> None:
        """Draws from a policy at some weights and keeps it."""
        w = self.writing
        call = {"each": w.each, "max_new_tokens": w.max_new_tokens, "seed": w.seed} | options
        self.take(name, sample_responses(policy, w.prompts, weights=weights, **call), order)

    def frontier(
        self, name: str, policy: MixturePolicy, expert_of: Mapping[str, int], objectives: Sequence[str], enough: float
    ) -> None:
        """Experts alone at every strength: any weights on them follow from these, since a mixture's mean is linear.

        An expert that is more than `enough` nats from the reference is not made stronger still.
        """
        order, near = list(expert_of.values()), list(objectives)
        for strength in self.writing.strengths:
            stronger = at_strength(policy, strength)
            for objective in near:
                weights = one_hot(expert_of[objective], len(order))
                self.write(f"{name}/{objective}/{strength:g}", stronger, weights, order)
            near = [o for o in near if self.arrays[f"{name}/{o}/{strength:g}/log_ratio"].mean() <= enough]

    def specialists(
        self, name: str, policy: MixturePolicy, expert_of: Mapping[str, int], objectives: Sequence[str]
    ) -> None:
        """Experts alone, as trained."""
        for objective in objectives:
            self.write(f"{name}/{objective}/1", policy, one_hot(expert_of[objective], len(expert_of)))

    def products(self, policy: MixturePolicy, order: Sequence[int], steps: int, enough: float) -> None:
        """Products of experts at the weights of `product_grid`, stronger until one is `enough` nats from the reference.

        Written by the soup, whose tokens are those of `decoder="product"` (see products.py) for one head's cost.
        """
        for weights in product_grid(len(order), steps):
            melted = soup(policy, weights[np.argsort(order)].tolist())
            for strength in self.writing.strengths:
                name = f"{product_name(weights)}/{strength:g}"
                self.write(name, at_strength(melted, logit_scale(weights, strength)), [1.0])
                if self.arrays[f"{name}/log_ratio"].mean() > enough:
                    break


def one_hot(index: int, num: int) -> list[float]:
    """Weights of one expert alone."""
    return [float(k == index) for k in range(num)]
