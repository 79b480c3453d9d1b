"""K against log-loss where no single Bradley-Terry policy can be right, beside what theory says can be reached.

    python recipes/beyond_one_model/run.py --model smollm2

README.md beside this file derives the floors and says what to expect. A run that is stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from preferences import (
    ITEMS,
    PAIRS,
    WORLDS,
    World,
    cross_entropy,
    entropy,
    largest_cycle,
    lowest_mixture,
    margins,
    random_utility_floor,
    single_floor,
)
from rows import Row, camp_expectation, camp_floor, camp_rows, population_rows
from transformers import PrinterCallback

from prefmix import MixtureConfig, MixturePolicy, MixtureTrainer
from prefmix.evaluation.plots import curve_svg
from prefmix.experts.base_model import BaseModel, load_base
from prefmix.mixture.linear_em import ProbeData, fit_linear_em

EXPERTS = (1, 2, 3, 4)
RIDGE = 1e-6  # of the tabular rewards: finite where the best reward is infinite
TABULAR_STARTS = 16
# A reward of a mixture (`likelihood: bt_lse`, `policy`) is one reward, whatever K: its floor is that of K = 1.
ONE_REWARD = ("bt_lse", "policy")


def floors() -> dict[str, dict[str, Any]]:
    """Everything that needs no training, by world."""
    found = {}
    for world in WORLDS:
        utility = random_utility_floor(world)
        found[world.name] = {
            "entropy": entropy(world),
            "single": single_floor(world),
            "random_utility": utility.value,
            "random_utility_gap": utility.gap,
            "lowest_found": {str(k): lowest_mixture(world, k) for k in EXPERTS},
        }
    return found


def tabular(world: World, num_experts: int, seed: int) -> float:
    """Log-loss of EM with a free reward for each item; the best of some starts by what was fitted."""
    rows = [
        (i, j)
        for (a, b), wins in zip(PAIRS, world.wins, strict=True)
        for i, j, count in ((a, b, wins), (b, a, world.of - wins))
        for _ in range(count)
    ]
    # The last item's reward is 0: only differences matter.
    item = torch.eye(ITEMS, dtype=torch.float64)[:, :-1]
    difference = torch.stack([item[i] - item[j] for i, j in rows])
    data = ProbeData(difference, torch.arange(len(rows)), torch.ones(len(rows), dtype=torch.float64), len(rows))
    fit = fit_linear_em(
        data,
        num_experts,
        torch.full((TABULAR_STARTS,), RIDGE),
        anneal=2.0,
        generator=torch.Generator().manual_seed(seed),
        max_steps=3000,
        tolerance=1e-9,
        weight_concentration=1.0,
    )
    best = int(fit.penalised.argmax())
    rewards = (fit.coefficients[best] @ item.T).numpy()
    predicted = fit.log_weights[best].exp().numpy() @ (1 / (1 + np.exp(-margins(rewards))))
    return cross_entropy(world.chance, predicted)


class Study:
    """Cells of one JSON, each written when it is there."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Goes on from `args.output` where it exists.

        Raises:
            ValueError: it was made with other settings.
        """
        self._args = args
        settings = {name: getattr(args, name) for name in ("steps", "learning_rate", "beta", "seeds", "users")}
        settings["model"] = Path(args.model).name
        self.results: dict[str, Any] = {"settings": settings, "floors": {}, "tabular": {}, "trained": {}, "camps": {}}
        self.results |= {"commit": _commit(), "machine": f"{platform.machine()}, Python {platform.python_version()}"}
        self.results["cpu_seconds"] = 0.0
        if args.output.is_file():
            self.results = json.loads(args.output.read_text(encoding="utf-8"))
            if self.results["settings"] != settings:
                raise ValueError(f"--output {args.output} was made with other settings; name another file")
        self._start = time.process_time() - self.results["cpu_seconds"]

    def without_models(self) -> None:
        """Floors, and EM on a table of rewards."""
        if not self.results["floors"]:
            self.results |= {"floors": floors(), "largest_cycle": largest_cycle()}
        for world in WORLDS:
            cells = self.results["tabular"].setdefault(world.name, {})
            for num_experts in EXPERTS:
                if str(num_experts) not in cells:
                    cells[str(num_experts)] = [tabular(world, num_experts, seed) for seed in self._args.seeds]
        self.write()

    def train(self, base: BaseModel) -> None:
        """All worlds and K on the language model."""
        for world in WORLDS:
            rows = population_rows(world)
            arms: dict[str, dict[str, Any]] = {str(k): {"num_experts": k} for k in self._args.experts}
            if world.name in self._args.one_reward_worlds:
                arms |= {f"3, {kind}": {"num_experts": 3, "likelihood": kind} for kind in ONE_REWARD}
            for arm, options in arms.items():
                options = {"latent": "pair"} | options
                cell = self.results["trained"].setdefault(world.name, {}).setdefault(arm, {})
                for seed in self._args.seeds:
                    self._fill(cell, f"{world.name}, K={arm}", base, (rows, rows), options, seed)

    def camps(self, base: BaseModel) -> None:
        """People of two camps: one expert, two by user, and two without knowing who is who."""
        test = camp_expectation(self._args.users)
        arms = {
            "1": {"num_experts": 1, "latent": "user"},
            "2, user": {"num_experts": 2, "latent": "user", "init": "probe", "pooling": 0.0},
            "2, pair": {"num_experts": 2, "latent": "pair"},
        }
        for arm, options in arms.items():
            for seed in self._args.seeds:
                train = camp_rows(self._args.users, 4, seed)
                if options["latent"] == "pair":
                    train = [{key: value for key, value in row.items() if key != "user"} for row in train]
                cell = self.results["camps"].setdefault(arm, {})
                self._fill(cell, f"camps, K={arm}", base, (train, test), options, seed)

    def _fill(
        self,
        cell: dict[str, float],
        name: str,
        base: BaseModel,
        rows: tuple[Sequence[Row], Sequence[Row]],
        options: Mapping[str, Any],
        seed: int,
    ) -> None:
        """Trains on the first rows and scores the second, unless that was done."""
        if str(seed) in cell:
            return
        cell[str(seed)] = log_loss(_trained(base, rows[0], options, seed, self._args), rows[1])
        self.write()
        print(f"{name}, seed {seed}: {cell[str(seed)]:.4f}", flush=True)

    def write(self) -> None:
        """Writes JSON."""
        self.results["cpu_seconds"] = round(time.process_time() - self._start, 1)
        self._args.output.parent.mkdir(parents=True, exist_ok=True)
        self._args.output.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")


def _trained(
    base: BaseModel, rows: Sequence[Row], options: Mapping[str, Any], seed: int, args: argparse.Namespace
) -> MixturePolicy:
    """A mixture of heads after full-batch steps; the expert's part of the rate falls to zero at the end."""
    folder = args.work_dir / "run"
    defaults = {"init": "random", "init_hold_epochs": args.steps / 20} | dict(options)
    several = int(defaults["num_experts"]) > 1
    config = MixtureConfig(
        str(folder),
        **({"gate_update": "closed_form"} if several and "likelihood" not in options else {"gate_update": "gradient"}),
        **defaults,
        beta=args.beta,
        expert_rank=16,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        max_steps=args.steps,
        per_device_train_batch_size=len(rows),
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        cache_states="memory",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        overwrite_output_dir=True,
    )
    trainer = MixtureTrainer(base, config, train_dataset=list(rows))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return trainer.policy


def log_loss(policy: MixturePolicy, rows: Sequence[Row]) -> float:
    """- weighted mean of log p, nats a comparison, by the policy's own scores."""
    weight = np.array([row["weight"] for row in rows])
    p = np.array([scored["probability"] for scored in policy.score(rows)])
    return float(-(weight * np.log(p)).sum() / weight.sum())


def table(results: Mapping[str, Any]) -> str:
    """One line for each world and engine, the floors beside them."""
    lines = []
    for world in WORLDS:
        floor = results["floors"][world.name]
        lines.append(
            f"{world.name}: K=1 floor {floor['single']:.4f}, random-utility floor {floor['random_utility']:.4f}, "
            f"entropy {floor['entropy']:.4f}"
        )
        lowest = ", ".join(f"K={k} {value:.4f}" for k, value in floor["lowest_found"].items())
        lines.append(f"  {'lowest found':14s} {lowest}")
        engines = {"tabular EM": results["tabular"][world.name]}
        engines["language model"] = results["trained"][world.name]
        for engine, cells in engines.items():
            lines.append(f"  {engine:14s} {', '.join(f'K={k} {_spread(cell)}' for k, cell in cells.items())}")
    found = ", ".join(f"K={arm} {_spread(cell)}" for arm, cell in results["camps"].items())
    lines.append(f"two camps: {found}; floors: without names {math.log(2):.4f}, with names {camp_floor():.4f}")
    return "\n".join(lines)


def _values(cell: Any) -> list[float]:
    return list(cell.values()) if isinstance(cell, dict) else cell


def _spread(cell: Any) -> str:
    values = _values(cell)
    return f"{min(values):.4f}" + (f"-{max(values):.4f}" if max(values) - min(values) > 1e-4 else "")


def picture(results: Mapping[str, Any], world: World) -> str:
    """SVG: K against log-loss of the language model, all seeds' mean, with the floors as flat lines."""
    cells, floor = results["trained"][world.name], results["floors"][world.name]
    ks = [int(k) for k in cells if k.isdigit()]
    achieved = [(float(k), float(np.mean(_values(cells[str(k)])))) for k in ks]
    flat = {"floor of one model": "single", "floor of any mixture": "random_utility", "entropy": "entropy"}
    curves = {f"trained, {results['settings']['model']}": achieved}
    curves |= {name: [(float(k), floor[key]) for k in ks] for name, key in flat.items()}
    return curve_svg(world.name, "experts K", "log-loss, nats a comparison", curves)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is missing, prints the table, draws the pictures."""
    args = _parser().parse_args(arguments)
    study = Study(args)
    study.without_models()
    base = load_base(args.model, dtype=torch.float32)
    study.train(base)
    study.camps(base)
    for index, world in enumerate(WORLDS):
        path = args.output.with_name(f"{args.output.stem}-{index}.svg")
        path.write_text(picture(study.results, world), encoding="utf-8")
    print(table(study.results))
    return study.results


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Preferences that no single model can hold, and mixtures that can.")
    parser.add_argument("--model", default="smollm2", help="base model")
    parser.add_argument("--experts", type=int, nargs="+", default=list(EXPERTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250, help="full-batch steps")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--users", type=int, default=60, help="people of the two camps")
    parser.add_argument("--one-reward-worlds", nargs="*", default=["cycle, p = 3/5"], help="also train one reward of K")
    parser.add_argument("--work-dir", type=Path, default=Path("beyond_one_model"))
    parser.add_argument("--output", type=Path, default=Path("beyond_one_model/results.json"))
    return parser


if __name__ == "__main__":
    main()
