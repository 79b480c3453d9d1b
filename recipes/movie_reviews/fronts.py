"""From what policies wrote to figures: equal-KL comparisons, the Pareto front, specialists against oracles.

Rewards are in standard deviations of the reference's responses to validation prompts, counted from the reference's
mean on the prompts at hand.

Legend: P prompts, S strengths, W weight vectors, R rewards, K experts (objectives).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from products import neighbours, product_grid, product_name

from prefmix.evaluation.generation_quality import Frontier
from prefmix.evaluation.intervals import Draw, Interval, nested_bootstrap
from prefmix.evaluation.pareto import hypervolume, simplex_grid

KLS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # nats; fixed before any run. The largest that all frontiers reach is reported.
CORNERS = {"at the reference": 0.0, "one sd below the reference": -1.0}
BETWEEN = 8  # points put between two neighbours of single DPO's frontier, which is one curve
WEIGHT_STEPS = 8
FRONTS = ("mixture", "product", "single DPO", "mixture - single DPO", "product - single DPO")


class SeedArrays(NamedTuple):
    """One seed's arrays, with what they mean.

    Attributes:
        arrays: of `judge.Judge`.
        objectives: names of the K objectives, the first K rewards.
        strengths: S.
        scale: [R] standard deviation of each reward under the reference, on validation prompts.
        each: responses for each prompt.
        product_steps: weights of products of experts are multiples of 1 / this.
    """

    arrays: Mapping[str, np.ndarray]
    objectives: Sequence[str]
    strengths: Sequence[float]
    scale: np.ndarray
    each: int
    product_steps: int

    @property
    def judged(self) -> list[str]:
        """Objectives whose specialists wrote: all of them, but for a run with a focus."""
        return [o for o in self.objectives if f"mixture/{o}/{self.strengths[0]:g}/rewards" in self.arrays]

    @property
    def whole(self) -> bool:
        """Whether the front of all weights can be drawn."""
        return len(self.judged) == len(self.objectives)

    def rewards(self, name: str) -> np.ndarray:
        """[P, R] mean standardised rewards of each prompt's responses."""
        columns = self.arrays[f"{name}/rewards"] / self.scale
        found: np.ndarray = columns.reshape(-1, self.each, columns.shape[1]).mean(axis=1)
        return found

    def kl(self, name: str) -> np.ndarray:
        """[P] mean log-ratios."""
        found: np.ndarray = self.arrays[f"{name}/log_ratio"].reshape(-1, self.each).mean(axis=1)
        return found

    def frontier(self, names: Sequence[str]) -> Frontier:
        """From the reference through these policies."""
        start = self.rewards("reference")
        return Frontier(
            np.stack([np.zeros(len(start)), *(self.kl(name) for name in names)]),
            np.stack([start, *(self.rewards(name) for name in names)]),
        )

    def single(self) -> Frontier:
        """Single DPO at all strengths that were written."""
        return self.frontier(self.written("single/all"))

    def specialist(self, objective: str) -> Frontier:
        """The mixture with all weight on one objective's expert."""
        return self.frontier(self.written(f"mixture/{objective}"))

    def written(self, policy: str) -> list[str]:
        """A policy's names at the strengths at which it wrote, rising."""
        names = [f"{policy}/{s:g}" for s in self.strengths]
        return [name for name in names if f"{name}/rewards" in self.arrays]

    def product(self, weights: np.ndarray) -> Frontier:
        """The product of experts at some weights of `product_grid`, or at a vertex, at the strengths written."""
        if weights.max() == 1:
            return self.specialist(self.objectives[int(weights.argmax())])
        return self.frontier(self.written(product_name(weights)))

    def mixture(self, weights: np.ndarray) -> Frontier:
        """sum_k w_k pi_k at all strengths at which its experts wrote, exactly from their samples."""
        kls, rewards = [np.zeros(len(self.rewards("reference")))], [self.rewards("reference")]
        used = np.flatnonzero(weights > 0)
        for strength in self.strengths:
            names = [f"mixture/{self.objectives[k]}/{strength:g}" for k in used]
            if not all(f"{name}/rewards" in self.arrays for name in names):
                break
            log_ratio = [self._mixed(self.arrays[f"{name}/expert_log_ratio"], weights) for name in names]
            kls.append(sum(w * r for w, r in zip(weights[used], log_ratio, strict=True)))
            rewards.append(sum(w * self.rewards(name) for w, name in zip(weights[used], names, strict=True)))
        return Frontier(np.stack(kls), np.stack(rewards))

    def _mixed(self, log_ratio: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """[P] mean of log sum_k w_k pi_k / pi_ref over the responses of one expert."""
        with np.errstate(divide="ignore"):
            joint = log_ratio + np.log(weights)
        top = joint.max(axis=1)
        mixed = top + np.log(np.exp(joint - top[:, None]).sum(axis=1))
        found: np.ndarray = mixed.reshape(-1, self.each).mean(axis=1)
        return found


def common_kl(seeds: Sequence[SeedArrays]) -> float:
    """The largest of `KLS` that single DPO, every specialist and the equal mixture reach in every seed."""
    ends = []
    for arrays in seeds:
        equal = np.full(len(arrays.objectives), 1 / len(arrays.objectives))
        families = [arrays.single(), *(arrays.specialist(o) for o in arrays.judged)]
        families += [arrays.mixture(equal)] if arrays.whole else []
        ends += [float(family.mean_kl.max()) for family in families]
    return max([kl for kl in KLS if kl <= min(ends)], default=KLS[0])


def gains_at_kl(seeds: Sequence[SeedArrays], kl: float, bootstraps: int) -> dict[str, dict[str, Interval]]:
    """Objective -> gain over the reference at equal KL: the specialist's, single DPO's, and their difference.

    `mean of objectives` is that of the equally weighted mixture, of the equally weighted product, and of single DPO,
    which is the theoretical ceiling there; absent from a run with a focus.
    """
    objectives, num = seeds[0].objectives, len(seeds[0].objectives)
    pairs = {o: [(s.specialist(o), s.single()) for s in seeds] for o in seeds[0].judged}
    equal = np.full(num, 1 / num)
    whole = [(s.mixture(equal), s.product(equal), s.single()) for s in seeds if s.whole]

    def statistic(draws: Sequence[Draw]) -> list[float]:
        found = []
        for objective, families in pairs.items():
            index = objectives.index(objective)
            gains = [_gains(families[d.group], d.members, kl)[:, index] for d in draws]
            found += [*np.mean(gains, axis=0), float(np.mean([g[0] - g[1] for g in gains]))]
        if not whole:
            return found
        means = [_gains(whole[d.group], d.members, kl)[:, :num].mean(axis=1) for d in draws]
        return [*found, *_with_differences(np.mean(means, axis=0))]

    intervals = nested_bootstrap(statistic, _sizes(seeds), num_resamples=bootstraps)
    names = ("mixture", "single DPO", "difference")
    found = {o: dict(zip(names, intervals[3 * i : 3 * i + 3], strict=True)) for i, o in enumerate(pairs)}
    return found | ({"mean of objectives": dict(zip(FRONTS, intervals[3 * num :], strict=True))} if whole else {})


def hypervolumes(seeds: Sequence[SeedArrays], kl: float, bootstraps: int) -> dict[str, dict[str, Interval]]:
    """Corner -> volume that each front dominates within a KL: `FRONTS`."""
    intervals = nested_bootstrap(_front_volumes(seeds, kl), _sizes(seeds), num_resamples=bootstraps)
    width = len(FRONTS)
    return {c: dict(zip(FRONTS, intervals[width * i : width * (i + 1)], strict=True)) for i, c in enumerate(CORNERS)}


def volumes_from_halves(seeds: Sequence[SeedArrays], kl: float) -> dict[str, dict[str, float]]:
    """Corner -> mean volume from every other prompt alone, as in `hypervolumes`.

    A front takes the best of noisy points, so its volume is a little too large, the more the fewer prompts there are:
    what halving the prompts adds is about what is too much in the whole.
    """
    volumes, sizes = _front_volumes(seeds, kl), _sizes(seeds)
    halves = [[Draw(group, np.arange(start, size, 2)) for group, size in enumerate(sizes)] for start in (0, 1)]
    means = np.mean([volumes(draws) for draws in halves], axis=0).reshape(len(CORNERS), len(FRONTS)).tolist()
    return {corner: dict(zip(FRONTS, row, strict=True)) for corner, row in zip(CORNERS, means, strict=True)}


def _front_volumes(seeds: Sequence[SeedArrays], kl: float) -> Callable[[Sequence[Draw]], np.ndarray]:
    """Statistic of `nested_bootstrap`: [corners x FRONTS] volumes, means over the drawn seeds.

    The mixture at all weights, the product at all weights (specialists are the vertices of both), single DPO at all
    strengths.
    """
    num = len(seeds[0].objectives)
    grid, steps = simplex_grid(num, WEIGHT_STEPS), seeds[0].product_steps
    product_weights = np.vstack([np.eye(num), product_grid(num, steps)])
    pairs = neighbours(product_weights, steps)
    families = [[s.mixture(weights) for weights in grid] for s in seeds]
    products = [[s.product(weights) for weights in product_weights] for s in seeds]
    singles = [s.single() for s in seeds]
    corners = [np.full(num, corner) for corner in CORNERS.values()]

    def statistic(draws: Sequence[Draw]) -> np.ndarray:
        volumes = []
        for draw in draws:
            mixed, made = ([f.drawn(draw.members) for f in found[draw.group]] for found in (families, products))
            fronts = (
                np.concatenate([_within(f, kl, 1) for f in mixed]),
                np.concatenate([_within(f, kl, 1) for f in made] + [_between(made, pairs, kl)]),
                _within(singles[draw.group].drawn(draw.members), kl, BETWEEN),
            )
            volumes.append([[hypervolume(front[:, :num], corner) for front in fronts] for corner in corners])
        return np.concatenate([_with_differences(row) for row in np.mean(volumes, axis=0)])

    return statistic


def share_of_oracle(seeds: Sequence[SeedArrays], method: str, bootstraps: int) -> dict[str, dict[str, Interval]]:
    """Objective -> (specialist - reference) / (oracle - reference), as trained, with both gains and KLs.

    For the mixture, which wrote at several strengths, also the share at the oracle's KL.
    """
    judged = seeds[0].judged

    def statistic(draws: Sequence[Draw]) -> list[float]:
        found = []
        for objective in judged:
            index = seeds[0].objectives.index(objective)
            columns = {name: f"{name}/{objective}/1" for name in (method, "oracle")}
            gains = {
                name: float(np.mean([_gain(seeds[d.group], key, index, d.members) for d in draws]))
                for name, key in columns.items()
            }
            kls = [
                float(np.mean([seeds[d.group].kl(key)[d.members].mean() for d in draws])) for key in columns.values()
            ]
            oracle = gains["oracle"] or float("nan")
            equal = float(np.mean([_at_oracle_kl(seeds[d.group], method, objective, index, d) for d in draws]))
            found += [gains[method] / oracle, equal / oracle, gains[method], gains["oracle"], *kls]
        return found

    intervals = nested_bootstrap(statistic, _sizes(seeds), num_resamples=bootstraps)
    names = ("share", "share at the oracle's KL", "gain", "oracle gain", "KL", "oracle KL")
    width = len(names)
    return {o: dict(zip(names, intervals[width * i : width * (i + 1)], strict=True)) for i, o in enumerate(judged)}


def _at_oracle_kl(arrays: SeedArrays, method: str, objective: str, index: int, draw: Draw) -> float:
    """Gain of the mixture's specialist at its oracle's KL; NaN for methods that wrote at one strength."""
    if method != "mixture":
        return float("nan")
    kl = float(arrays.kl(f"oracle/{objective}/1")[draw.members].mean())
    return float(_gains([arrays.specialist(objective)], draw.members, kl)[0, index])


def _gain(arrays: SeedArrays, name: str, index: int, prompts: np.ndarray) -> float:
    return float((arrays.rewards(name) - arrays.rewards("reference"))[prompts, index].mean())


def _gains(families: Sequence[Frontier], prompts: np.ndarray, kl: float) -> np.ndarray:
    """[families, R] rewards at a KL minus the reference's."""
    drawn = [family.drawn(prompts) for family in families]
    return np.stack([family.at_kl(kl) - family.rewards[0].mean(axis=0) for family in drawn])


def _within(family: Frontier, kl: float, between: int) -> np.ndarray:
    """[M, R] points of a frontier with at most this KL, as gains over the reference; `between` to each segment."""
    kls = family.mean_kl
    grid = np.unique(np.concatenate([np.linspace(a, b, between + 1) for a, b in zip(kls[:-1], kls[1:])]))
    grid = np.append(grid[grid < kl], min(kl, kls.max()))
    return np.stack([family.at_kl(x) for x in grid]) - family.rewards[0].mean(axis=0)


def _between(families: Sequence[Frontier], pairs: np.ndarray, kl: float) -> np.ndarray:
    """[E, R] gains half-way between two policies of at most this KL: what drawing one of them for each answer gives."""
    gains = np.stack([family.at_kl(kl) - family.rewards[0].mean(axis=0) for family in families])
    found: np.ndarray = gains[pairs].mean(axis=1)
    return found


def _with_differences(three: np.ndarray) -> np.ndarray:
    """[5] of `FRONTS` from its first three."""
    return np.append(three, [three[0] - three[2], three[1] - three[2]])


def _sizes(seeds: Sequence[SeedArrays]) -> list[int]:
    return [len(arrays.rewards("reference")) for arrays in seeds]
