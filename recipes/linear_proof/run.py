"""Does the inference find what is there? Planted linear tastes, thousands of small fits, seconds each.

    python recipes/linear_proof/run.py                  all parts, 20 seeds; finished cells are kept
    python recipes/linear_proof/run.py --part recovery --seeds 5

Writes results/linear_proof.json after every cell and prints the tables from it. No fit reads a taste or a group.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tables import print_tables
from world import (
    FEATURES,
    World,
    draw_world,
    near_tastes,
    opposed_tastes,
    orthogonal_tastes,
    row_evidence,
    score,
    shape,
    true_log_weights,
    user_log_weights,
)

from prefmix.evaluation.metrics import adjusted_rand_index
from prefmix.mixture.linear_em import LinearEM, ProbeData, fit_linear_em
from prefmix.mixture.spectral import spectral_resp, summed_differences
from prefmix.mixture.split_merge import keep_start, split_and_merge

RIDGE = 1.0
FRESH = 16
ROWS = 12_000
TASTES = (1, 2, 3, 4, 5, 6)
COMPARISONS = (1, 2, 4, 8, 16, 32)
PARTS = ("opposed", "recovery", "restarts", "hard_restarts")
RESULTS = Path(__file__).parent / "results" / "linear_proof.json"


def guarded_fit(data: ProbeData, num_experts: int, seed: int, restarts: int = 4) -> LinearEM:
    """What the probe does at a given ridge: annealed EM from random starts and a spectral one, then split and merge."""
    generator = torch.Generator().manual_seed(seed)
    starts = 1 if num_experts == 1 else restarts
    first = torch.full((starts, data.num_groups, num_experts), math.nan)
    if starts > 1:
        first[-1] = spectral_resp(summed_differences(data), num_experts, generator)
    fit = fit_linear_em(
        data, num_experts, torch.full((starts,), RIDGE), anneal=4.0, generator=generator, tolerance=1e-6,
        first_resp=first,
    )  # fmt: skip
    return split_and_merge(data, fit, RIDGE)


def compare(world: World, held_out: World, seed: int, restarts: int) -> dict[str, float]:
    """Mixture with K = K_true, one expert, and the Bayes rule with the true tastes, on fresh comparisons."""
    data, num = world.data, len(world.tastes)
    fresh = torch.randn(data.num_groups, FRESH, FEATURES, generator=torch.Generator().manual_seed(seed + 10_000))
    mixture, single = guarded_fit(data, num, seed, restarts), guarded_fit(data, 1, seed)
    log_w = true_log_weights(world)
    arms = {
        "bayes": (world.tastes, log_w, user_log_weights(data, world.tastes, log_w)),
        "mixture": (mixture.coefficients[0], mixture.log_weights[0], mixture.log_resp[0]),
        "single": (single.coefficients[0], single.log_weights[0], single.log_resp[0]),
    }
    found: dict[str, float] = {}
    for name, (coefficients, weights, log_resp) in arms.items():
        scores = score(world, coefficients, log_resp, fresh)
        found |= {f"{name}_accuracy": scores.accuracy, f"{name}_log_loss": scores.log_loss}
        found[f"{name}_evidence"] = row_evidence(held_out.data, coefficients, weights)
    found["ari"] = float(adjusted_rand_index(world.taste.numpy(), mixture.log_resp[0].argmax(1).numpy()))
    return found


def opposed(each: int, seed: int, *, rows: int = ROWS) -> dict[str, float]:
    """Figure 1: halves of opposite taste."""
    generator = torch.Generator().manual_seed(1000 * each + seed)
    tastes = opposed_tastes(generator)
    world = draw_world(tastes, rows // each, each, generator)
    return compare(world, draw_world(tastes, 200, each, generator), seed, restarts=3)


def recovery(each: int, num: int, seed: int, *, users: int = 240) -> dict[str, float]:
    """A cell of the recovery table: K_true tastes at right angles."""
    generator = torch.Generator().manual_seed(100_000 * num + 1000 * each + seed)
    tastes = orthogonal_tastes(num, generator)
    world = draw_world(tastes, users, each, generator)
    return compare(world, draw_world(tastes, users, each, generator), seed, restarts=4)


def restarts(seed: int, *, users: int = 60, each: int = 12, inner: int = 4, reference: int = 24) -> dict[str, float]:
    """Figure 4, the easy setting: three tastes at right angles, equal groups."""
    generator = torch.Generator().manual_seed(seed)
    data = draw_world(orthogonal_tastes(3, generator), users, each, generator).data
    return closed_shares(data, seed, inner, reference, generator)


def hard_restarts(
    seed: int, *, users: int = 240, each: int = 6, inner: int = 8, reference: int = 16
) -> dict[str, float]:
    """Figure 4, a setting where single starts fail: close tastes, unequal groups, six comparisons, 16 features."""
    generator = torch.Generator().manual_seed(50_000 + seed)
    tastes = near_tastes(3, 16, 0.5, generator)
    data = draw_world(tastes, users, each, generator, shares=(0.6, 0.3, 0.1)).data
    return closed_shares(data, seed, inner, reference, generator)


def closed_shares(
    data: ProbeData, seed: int, inner: int, reference: int, generator: torch.Generator
) -> dict[str, float]:
    """The share of (best found - one expert) that one guarded run closes: in evidence, and in what EM maximises.

    Starts are chosen by penalised evidence, so the best found is the evidence of the fit that is best in that.
    """
    single, fit = guarded_fit(data, 1, seed), guarded_fit(data, 3, seed, inner)
    many = fit_linear_em(data, 3, torch.full((reference,), RIDGE), anneal=4.0, generator=generator, tolerance=1e-6)
    plain = fit_linear_em(data, 3, torch.full((8,), RIDGE), anneal=1.0, anneal_steps=0, generator=generator)
    fits = [fit, split_and_merge(data, many, RIDGE), keep_start(plain, int(plain.penalised.argmax()))]
    best = max(fits, key=lambda f: float(f.penalised[0]))
    gain, objective = best.log_evidence[0] - single.log_evidence[0], best.penalised[0] - single.penalised[0]

    def share_of_starts(starts: LinearEM) -> float:
        return float(((starts.log_evidence - single.log_evidence[0]) / gain >= 0.99).float().mean())

    return {
        "guarded": float((fit.log_evidence[0] - single.log_evidence[0]) / gain),
        "guarded_objective": float((fit.penalised[0] - single.penalised[0]) / objective),
        "plain_starts": share_of_starts(plain),
        "annealed_starts": share_of_starts(many),
        "gain": float(gain),
    }


def cells(part: str, seeds: int) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Key and work of every cell; seeds outermost, so that a run that is cut short has whole tables of few seeds."""
    for seed in range(100 if part.endswith("restarts") and seeds >= 20 else seeds):
        if part == "opposed":
            for each in (2, 8, 16):
                yield shape(part=part, each=each, seed=seed), lambda e=each, s=seed: opposed(e, s)
        elif part == "recovery":
            for num in TASTES:
                for each in COMPARISONS:
                    key = shape(part=part, tastes=num, each=each, seed=seed)
                    yield key, lambda e=each, n=num, s=seed: recovery(e, n, s)
        else:
            work = restarts if part == "restarts" else hard_restarts
            yield shape(part=part, seed=seed), lambda s=seed, f=work: f(s)


def run(parts: tuple[str, ...], seeds: int, path: Path, budget: float = math.inf) -> dict[str, Any]:
    """Fills in the cells that `path` lacks; `budget` is in CPU seconds."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    began = time.process_time()
    for part in parts:
        for key, work in cells(part, seeds):
            if key in found or time.process_time() - began > budget:
                continue
            found[key] = work()
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
            partial.replace(path)
    return found


def main() -> None:
    """Parses, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=20, help="of every cell; restarts take 100 from 20 on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=math.inf, help="CPU seconds after which no cell is begun")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_tables(run(tuple(args.part or PARTS), args.seeds, args.results, args.budget))


if __name__ == "__main__":
    main()
