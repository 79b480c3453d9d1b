"""Types or blends, on a language model: heads of SmolLM2, users of one taste each and users who blend tastes.

    python recipes/continuous_users/language_model.py --model smollm2

Invented people judge real arguments (UKPConvArg1). Their three tastes are linear in what the language model sees of a
text (principal directions of its mean states), so heads can learn them; nothing that is fitted reads tastes, weights or
which kind of people there are. The vocabulary is cut to the arguments' tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from prefmix.data.convarg import load_convarg
from prefmix.data.simulated_texts import TextPool
from prefmix.data.simulation import Simulated, simulate
from prefmix.data.simulation_options import SimulationOptions
from prefmix.data.tokenization import tokenize_rows
from prefmix.experiments.baselines import Arm, Splits, tokenize_splits, train_arm
from prefmix.experiments.comparison_files import provenance
from prefmix.experiments.demo import fast_dtype
from prefmix.experiments.seen_vocabulary import seen_vocabulary
from prefmix.experts.base_model import BaseModel, load_base
from prefmix.experts.trunk_cache import build_trunk_states
from prefmix.mixture.features import pool_features

TASTES, ATTRIBUTES, SCALE = 3, 6, 3.0
VALIDATION_SHARE = 0.15
# Dirichlet concentration of each kind of people; None: one taste each.
KINDS = {"discrete": None, "continuous": 1.0}
ARMS = {
    "single": Arm("single", {"num_experts": 1, "init": "random"}),
    "user": Arm("user", {"num_experts": TASTES, "latent": "user", "init": "probe"}),
    "membership": Arm("membership", {"num_experts": TASTES, "latent": "membership", "init": "probe"}),
}


class Score(NamedTuple):
    """On held-out comparisons under the true probabilities: that of the predicted side, and the log-loss."""

    accuracy: float
    log_loss: float


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs every seed, kind of people and arm; writes after each."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(args).items() if name not in ("work_dir", "output")}
    settings |= {"model": Path(args.model).name} | provenance()
    report: dict[str, Any] = {"settings": settings, "runs": finished_runs(args.output)}
    small, pool = argument_pool(args)
    for seed in args.seeds:
        for kind, alpha in KINDS.items():
            if any(run["seed"] == seed and run["kind"] == kind for run in report["runs"]):
                continue
            began = time.process_time()
            run = {"seed": seed, "kind": kind} | run_kind(small, pool, alpha, seed, args)
            report["runs"].append(run | {"cpu_seconds": time.process_time() - began})
            report["summary"] = summary(report["runs"])
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(report["runs"][-1]["scores"]), flush=True)
    print(json.dumps(report["summary"], indent=1))
    return report


def finished_runs(path: Path) -> list[dict[str, Any]]:
    """What an earlier call with the same output has done; delete the file after changing a setting."""
    return list(json.loads(path.read_text(encoding="utf-8"))["runs"]) if path.exists() else []


def argument_pool(args: argparse.Namespace) -> tuple[BaseModel, TextPool]:
    """The arguments of some debates, written as token ids of the small vocabulary, and what the trunk sees in them."""
    base = load_base(args.model, dtype=fast_dtype() if args.dtype == "auto" else getattr(torch, args.dtype))
    rows = load_convarg(topics=args.debates, max_words=args.max_words)
    texts = list(dict.fromkeys((row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")))
    by_prompt: dict[str, list[str]] = {}
    for prompt, text in texts:
        by_prompt.setdefault(prompt, []).append(text)
    catalogue = [
        {"prompt": prompt, "chosen": found[i], "rejected": found[i - 1]}
        for prompt, found in by_prompt.items()
        for i in range(len(found))
        if found[i] != found[i - 1]
    ]
    small, (cut,) = seen_vocabulary([catalogue], base, args.work_dir / "arguments")
    table = tokenize_rows(cut, small.tokenizer, max_length=None, progress=False)  # type: ignore[arg-type]
    states = build_trunk_states(small, table.texts, mode="memory", dtype=small.model.dtype, progress=False)
    seen = pool_features(
        states.completion_mean, ATTRIBUTES, centre_by=torch.from_numpy(table.texts.prompt_index), spectrum_power=0.0
    )
    names = [f"direction {index}" for index in range(seen.features.shape[1])]
    # Unit spread within a prompt; the difference of two texts has twice that variance.
    attributes = np.sqrt(0.5) * seen.features.double().numpy()
    texts_as_ids = [json.dumps([list(map(int, ids))]) for ids in table.texts.completion_ids]
    prompts = [json.dumps([list(map(int, ids))]) for ids in table.texts.prompts]
    return small, TextPool(prompts, table.texts.prompt_index, texts_as_ids, attributes, names, rotated=True)


def run_kind(
    base: BaseModel, pool: TextPool, alpha: float | None, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One set of invented people, every arm trained on it."""
    options = SimulationOptions(
        num_groups=TASTES, layout="orthogonal", scale=SCALE, num_users=args.users, alpha=alpha,
        comparisons_per_user=args.comparisons, test_per_user=args.test_per_user,
    )  # fmt: skip
    people = simulate({"train": pool, "test": pool}, options, seed)
    splits = make_splits(people, base, seed)
    scores = {"known weights": score(people, splits, None)}
    chosen = {}
    for name, arm in ARMS.items():
        trained = train_arm(arm, splits, base, _options(args, base), seed=seed, output_dir=args.work_dir / "runs")
        way = "population" if name == "single" else "personalised"
        scores[name] = score(people, splits, trained.report.predictions[way].logit)
        chosen[name] = {"epoch": trained.epoch, "validation_log_loss": trained.validation}
        chosen[name]["usage"] = [float(share) for share in trained.report.usage]
    return {"scores": {name: value._asdict() for name, value in scores.items()}, "chosen": chosen}


def make_splits(people: Simulated, base: BaseModel, seed: int) -> Splits:
    """Some of the training rows choose the epoch; the test rows are scored."""
    rows = [_with_ids(row) for row in people.rows("train")]
    held = set(np.random.default_rng([seed, 21]).permutation(len(rows))[: round(VALIDATION_SHARE * len(rows))].tolist())
    train = [row for index, row in enumerate(rows) if index not in held]
    validation = [rows[index] for index in sorted(held)]
    return tokenize_splits(train, validation, [_with_ids(row) for row in people.rows("test")], base, max_length=None)


def score(people: Simulated, splits: Splits, logit: np.ndarray | None) -> Score:
    """Expected accuracy and log-loss of test rows by their true probabilities; of the truth itself without log-odds."""
    judged = people.judged["test"]
    rows = np.asarray(splits.test.source_row)
    truth = (people.weights[judged.user] / (1.0 + np.exp(-judged.margins))).sum(axis=1)
    # Rows name the chosen text first; the truth is about the first.
    truth = np.where(judged.answer > 0, truth, 1.0 - truth)[rows]
    said = truth if logit is None else 1.0 / (1.0 + np.exp(-logit))
    said = said.clip(1e-12, 1 - 1e-12)
    accuracy = np.where(said > 0.5, truth, 1.0 - truth).mean()
    log_loss = -(truth * np.log(said) + (1.0 - truth) * np.log1p(-said)).mean()
    return Score(float(accuracy), float(log_loss))


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and membership minus user with its 95% interval over seeds (t), for each kind of people."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        scores = [run["scores"] for run in runs if run["kind"] == kind]
        if not scores:
            continue
        found[kind] = {"seeds": len(scores)}
        for figure in ("accuracy", "log_loss"):
            means = {arm: float(np.mean([entry[arm][figure] for entry in scores])) for arm in scores[0]}
            gaps = np.array([entry["membership"][figure] - entry["user"][figure] for entry in scores])
            found[kind][figure] = means | {"membership minus user": gaps.tolist(), "half_width": half_width(gaps)}
    return found


def half_width(values: np.ndarray) -> float | None:
    """Of the 95% interval of a mean, Student's t; None for one value."""
    if len(values) < 2:
        return None
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.6)
    return float(quantile * values.std(ddof=1) / np.sqrt(len(values)))


def _with_ids(row: dict[str, Any]) -> dict[str, Any]:
    """Texts of the pool are written as token ids of the small vocabulary."""
    return {"user": row["user"]} | {
        f"{name}_ids": json.loads(row[name])[0] for name in ("prompt", "chosen", "rejected")
    }


def _options(args: argparse.Namespace, base: BaseModel) -> dict[str, Any]:
    return {
        "bf16": base.model.dtype == torch.bfloat16,
        "cache_dir": str(args.work_dir / "trunk_states"),
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "expert_rank": 16,
        "init_hold_epochs": args.hold,
        "pooling": 0.0,  # as its results were made
        "group_texts": True,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "probe_restarts": 4,
        "probe_dim": 16,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Types or blends of experts, on a language model.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--debates", nargs="+", default=["Firefox", "TV is better"])
    parser.add_argument("--max-words", type=int, default=30)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--comparisons", type=int, default=32)
    parser.add_argument("--test-per-user", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8, help="the best one on validation rows is kept")
    parser.add_argument("--hold", type=float, default=2.0, help="epochs that hold the probe's responsibilities")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--work-dir", type=Path, default=Path("continuous_users"), help="cut model, states, runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "language_model.json")
    return parser


if __name__ == "__main__":
    main()
