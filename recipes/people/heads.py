"""The same people with real experts: heads over the language model, trained by the trainer, on one set.

    python recipes/people/heads.py --model smollm2 --set jester --seeds 0

The vocabulary is cut to the set's tokens (`experiments/seen_vocabulary.py`). Every arm has the same grid of learning
rates; the epoch and the rate with the lowest validation log-loss are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from cells import hits
from figures import collect, interval
from sets import NAMES, Row, cut, load_set, shuffle_users

from prefmix.experiments.baselines import Arm, Splits, TrainedArm, tokenize_splits, train_arm
from prefmix.experiments.comparison_files import provenance
from prefmix.experiments.demo import fast_dtype
from prefmix.experiments.seen_vocabulary import seen_vocabulary
from prefmix.experts.base_model import BaseModel, load_base

RESULTS = Path(__file__).parent / "results"


class Scored(NamedTuple):
    """An arm's test rows: names, person of each row, log-loss and hit of each."""

    names: Sequence[str]
    user: np.ndarray
    loss: np.ndarray
    hit: np.ndarray


def arms(experts: int, pooling: float = 0.0, hold_epochs: float = 2.0) -> dict[str, tuple[Arm, bool]]:
    """Name -> what is trained, and whether its training rows have authors from a hat."""
    user = {"num_experts": experts, "latent": "user", "init": "probe", "init_hold_epochs": hold_epochs}
    user["pooling"] = pooling
    membership = user | {"latent": "membership"}
    return {
        "single": (Arm("single", {"num_experts": 1, "init": "random"}), False),
        "user": (Arm("user", user), False),
        "membership": (Arm("membership", membership), False),
        "user, shuffled ids": (Arm("user-shuffled", user), True),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains what is not there yet and writes the figures after each seed."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, list[tuple[Scored, dict[str, Any]]]] = {}
    report: dict[str, Any] = {}
    for seed in args.seeds:
        splits, base = _prepare(args, seed)
        for name, (arm, shuffled) in arms(args.experts, args.pooling, args.hold_epochs).items():
            scored = _best(arm, splits[shuffled], base, args, seed)
            found.setdefault(name, []).append(scored)
            print(f"seed {seed}, {name}: {scored[1]}", flush=True)
        report = _report(found, args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, figures in report["arms"].items():
        print(name, {key: value for key, value in figures.items() if key != "choices"})
    return report


def _prepare(args: argparse.Namespace, seed: int) -> tuple[dict[bool, Splits], BaseModel]:
    """The set's rows in the small vocabulary, with true and with shuffled ids in training."""
    base = load_base(args.model, dtype=fast_dtype() if args.dtype == "auto" else getattr(torch, args.dtype))
    people = load_set(args.set, max_users=args.max_users)
    known = cut(people, seed).known
    # Comparisons drawn from ratings share them: a row is not a whole answer (README.md).
    known["train"] = [{**row, "weight": args.row_weight} for row in known["train"]]
    users = {row["user"] for row in known["train"]}
    parts: list[Sequence[Row]] = [known["train"]]
    parts += [[row for row in known[part] if row["user"] in users] for part in ("validation", "test")]
    parts.append(shuffle_users(known["train"], seed))
    small, (train, validation, test, shuffled) = seen_vocabulary(parts, base, args.work_dir / f"{args.set}-{seed}")
    return {
        False: tokenize_splits(train, validation, test, small, max_length=None),
        True: tokenize_splits(shuffled, validation, test, small, max_length=None),
    }, small


def _best(
    arm: Arm, splits: Splits, base: BaseModel, args: argparse.Namespace, seed: int
) -> tuple[Scored, dict[str, Any]]:
    """Trains at every rate of the grid; the lowest validation log-loss decides."""
    best: TrainedArm | None = None
    choices, began = [], time.process_time()
    for rate in args.rates:
        options = _options(args, base) | {"learning_rate": rate}
        trained = train_arm(arm, splits, base, options, seed=seed, output_dir=args.work_dir / "runs")
        choices.append({"rate": rate, "epoch": trained.epoch, "validation_log_loss": trained.validation})
        if best is None or min(trained.validation) < min(best.validation):
            best = trained
    assert best is not None
    predictions = best.report.predictions["population" if arm.name == "single" else "personalised"]
    hit = hits(torch.from_numpy(predictions.logit))
    scored = Scored(list(splits.test.users), best.report.user, -predictions.log_prob, hit)
    usage = [round(float(share), 3) for share in best.report.usage]
    return scored, {"choices": choices, "usage": usage, "cpu_seconds": time.process_time() - began}


def _options(args: argparse.Namespace, base: BaseModel) -> dict[str, Any]:
    return {
        "bf16": base.model.dtype == torch.bfloat16,
        "cache_dir": str(args.work_dir / "trunk_states"),
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "expert_rank": 16,
        "token_dropout": args.token_dropout,
        "group_texts": True,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 3,
        "probe_restarts": 4,
        "probe_dim": 32,
    }


def _report(found: Mapping[str, Sequence[tuple[Scored, dict[str, Any]]]], args: argparse.Namespace) -> dict[str, Any]:
    """Figures of every arm, and paired with single DPO on the same rows."""
    by_arm: dict[str, Any] = {}
    single = [scored for scored, _ in found["single"]]
    for name, runs in found.items():
        by_arm[name] = {"choices": [about for _, about in runs]}
        for figure in ("loss", "hit"):
            own = [getattr(scored, figure) for scored, _ in runs]
            names = [(scored.names, scored.user) for scored, _ in runs]
            by_arm[name][figure] = interval(collect([(*who, value) for who, value in zip(names, own)]))._asdict()
            if name != "single":
                gains = [value - getattr(first, figure) for value, first in zip(own, single)]
                sums = collect([(*who, gain) for who, gain in zip(names, gains)])
                by_arm[name][f"{figure}_minus_single"] = interval(sums)._asdict()
    settings = {name: value for name, value in vars(args).items() if name not in ("work_dir", "output")}
    settings |= {"model": Path(args.model).name} | provenance()
    return {"settings": settings, "rows": len(found["single"][0][0].user), "arms": by_arm}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Real people with heads over a language model.")
    parser.add_argument("--set", choices=NAMES, default="jester")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument(
        "--pooling", type=float, default=0.0, help="of mixtures: how strongly experts are drawn together"
    )
    parser.add_argument(
        "--hold-epochs", type=float, default=2.0, help="of mixtures: first responsibilities stay so long"
    )
    parser.add_argument("--row-weight", type=float, default=0.4, help="of training rows, for every arm")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3], help="grid of learning rates")
    parser.add_argument("--epochs", type=int, default=6, help="the best one on validation rows is kept")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--token-dropout", type=float, default=0.5)
    parser.add_argument("--max-users", type=int, default=400)
    parser.add_argument("--work-dir", type=Path, default=Path("people"), help="cut models, states, runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "heads.json")
    return parser


if __name__ == "__main__":
    main()
