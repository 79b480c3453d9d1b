"""Planted groups of review readers: does the mixture find them, and does it serve them as well as an oracle would?

    python recipes/planted_groups/run.py --setting 40x16 --seeds 0 1 2 3 4 --output results.json

README.md beside this file says what to expect.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefmix.data.planted_tasks import review_groups
from prefmix.experiments.baselines import Splits, standard_arms, tokenize_splits
from prefmix.experiments.compare import Comparison, SeedResult, run_seed
from prefmix.experiments.demo import fast_dtype
from prefmix.experiments.seen_vocabulary import seen_vocabulary
from prefmix.experts.base_model import BaseModel, load_base


class Setting(NamedTuple):
    """One planted experiment.

    Attributes:
        task: of `review_groups`.
        num_users: U.
        comparisons_per_user: training comparisons of each.
        num_groups: G, and the number of experts.
        seeds: what the issue asks for.
    """

    task: str
    num_users: int
    comparisons_per_user: int
    num_groups: int
    seeds: tuple[int, ...]


SETTINGS = {
    "40x16": Setting("sentiment", 40, 16, 2, (0, 1, 2, 3, 4)),
    "200x8": Setting("sentiment", 200, 8, 2, (0, 1, 2)),
    "three": Setting("domain", 100, 16, 3, (0, 1, 2)),
}


def main(arguments: Sequence[str] | None = None) -> Comparison:
    """Runs one setting over seeds; prints the table and writes JSON."""
    args = _parser().parse_args(arguments)
    setting = SETTINGS[args.setting]
    start = time.perf_counter()
    results = []
    for seed in setting.seeds if args.seeds is None else args.seeds:
        results.append(_run_seed(args, setting, seed))
        comparison = Comparison(f"planted groups {args.setting}, vocabulary={args.vocabulary}", results)
        # Written after every seed: a long run that is stopped has said what it knows.
        _write(args, comparison, time.perf_counter() - start)
    print(comparison.table())
    return comparison


def _run_seed(args: argparse.Namespace, setting: Setting, seed: int) -> SeedResult:
    splits, base = prepare(args, setting, seed)
    arms = standard_arms(setting.num_groups, setting.num_groups)
    if args.arms is not None:
        arms = {name: arm for name, arm in arms.items() if name in args.arms}
    return run_seed(
        splits,
        base,
        arms,
        _options(args, base),
        num_experts=setting.num_groups,
        seed=seed,
        output_dir=args.work_dir / "runs" / args.setting,
        say=lambda line: print(f"[{args.setting}] {line}", flush=True),
    )


def prepare(args: argparse.Namespace, setting: Setting, seed: int) -> tuple[Splits, BaseModel]:
    """Rows, tables and the base model (cut to the texts' tokens under `--vocabulary seen`)."""
    dtype = fast_dtype() if args.dtype == "auto" else getattr(torch, args.dtype)
    base = load_base(args.model, dtype=dtype)
    rows = review_groups(
        setting.task,  # type: ignore[arg-type]
        num_users=args.num_users or setting.num_users,
        comparisons_per_user=args.comparisons or setting.comparisons_per_user,
        seed=seed,
        texts_per_side=args.texts_per_side,
        num_words=args.num_words,
    )
    parts: list[Any] = [rows.train, rows.validation, rows.test]
    if args.vocabulary == "seen":
        folder = args.work_dir / f"seen-{args.setting}-{seed}-{args.texts_per_side}x{args.num_words}"
        base, parts = seen_vocabulary(parts, base, folder)
    return tokenize_splits(parts[0], parts[1], parts[2], base), base


def _options(args: argparse.Namespace, base: BaseModel) -> dict[str, Any]:
    return {
        "bf16": base.model.dtype == torch.bfloat16,
        "cache_dir": str(args.work_dir / "trunk_states"),
        "learning_rate": args.learning_rate,
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "beta": args.beta,
        "expert_rank": args.rank,
        "head": args.head,
        "weight_decay": args.weight_decay,
        "token_dropout": args.token_dropout,
        "pooling": 0.0,  # as its results were made
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "probe_dim": args.probe_dim,
    }


def _write(args: argparse.Namespace, comparison: Comparison, seconds: float) -> None:
    # Folders of this machine say nothing to others.
    settings = {name: value for name, value in vars(args).items() if name not in ("work_dir", "output")}
    settings["model"] = Path(args.model).name
    report = {"settings": settings, "seconds": seconds, **comparison.to_dict()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Planted groups of review readers on a real language model.")
    parser.add_argument("--setting", choices=SETTINGS, default="40x16", help="users x comparisons, or three groups")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the setting")
    parser.add_argument("--model", default="smollm2", help="base model")
    parser.add_argument("--vocabulary", choices=("seen", "full"), default="seen", help="seen: only the texts' tokens")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the trunk")
    parser.add_argument("--texts-per-side", type=int, default=600, help="60%% of them for training")
    parser.add_argument("--num-words", type=int, default=30, help="reviews are cut to so many words")
    parser.add_argument("--num-users", type=int, help="instead of the setting's")
    parser.add_argument("--comparisons", type=int, help="training comparisons of a user, instead of the setting's")
    parser.add_argument("--arms", nargs="+", help="train these models only")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--token-dropout", type=float, default=0.5, help="share of tokens left out of each step")
    parser.add_argument("--epochs", type=int, default=10, help="the best one on validation texts is kept")
    parser.add_argument("--batch-size", type=int, default=32, help="comparisons a step")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--head", choices=("hidden", "logit"), default="hidden")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--probe-dim", type=int, default=64)
    parser.add_argument("--work-dir", type=Path, default=Path("planted_groups"), help="cut models and cached states")
    parser.add_argument("--output", type=Path, default=Path("planted_groups/results.json"))
    return parser


if __name__ == "__main__":
    main()
