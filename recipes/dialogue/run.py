"""Dialogues of several turns and people who want brief or thorough answers, from rows to `prefmix chat`.

    python recipes/dialogue/run.py --model smollm2

README.md beside this file says what to expect.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dialogues import CHAT_TEMPLATE, TASTES, Dialogue, judged, read_dialogues

from prefmix.evaluation.intervals import paired_difference
from prefmix.evaluation.metrics import hits
from prefmix.experiments.baselines import Arm, Splits, TrainedArm, tokenize_splits, train_arm
from prefmix.experts.base_model import BaseModel, load_base

ARMS = (
    Arm("single DPO", {"num_experts": 1, "init": "random"}),
    Arm("mixture", {"num_experts": 2, "init": "probe", "pooling": 0.0}),  # as its results were made
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, evaluates, chats as two people, and writes JSON."""
    args = _parser().parse_args(arguments)
    start = time.process_time()
    base = chat_base(args.model, args.work_dir / "base")
    splits, asked = draw(args, base)
    trained = {arm.name: _train(args, arm, splits, base) for arm in ARMS}
    report: dict[str, Any] = {
        "settings": _settings(args),
        "rows": {name: len(table) for name, table in splits._asdict().items() if table is not None},
        "arms": {name: arm.report.to_dict() for name, arm in trained.items()},
        "mixture_minus_single": _difference(trained),
    }
    report["chat"] = chat(trained["mixture"].folder / "policy", asked, args)
    report |= {"commit": _commit(), "machine": platform.machine()}
    report["cpu_seconds_without_chat"] = round(time.process_time() - start, 1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(summary(report))
    return report


def chat_base(source: str, folder: Path) -> BaseModel:
    """The base model; one whose tokenizer has no chat template is written to `folder` with a plain one."""
    base = load_base(source, dtype=torch.float32)
    assert base.tokenizer is not None
    if base.tokenizer.chat_template is not None:
        return base
    base.tokenizer.chat_template = CHAT_TEMPLATE
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return load_base(folder, dtype=torch.float32)


def draw(args: argparse.Namespace, base: BaseModel) -> tuple[Splits, list[Dialogue]]:
    """Rows of the same people over disjoint dialogues, and dialogues that nobody judged, to chat about."""
    rng, dialogues = np.random.default_rng(args.seed), read_dialogues()
    order = [dialogues[i] for i in rng.permutation(len(dialogues))]
    counts = (args.dialogues, args.dialogues // 4, args.dialogues // 2)
    parts = np.split(np.arange(len(order)), np.cumsum(counts))
    each = (args.comparisons, max(2, args.comparisons // 4), max(2, args.comparisons // 2))
    rows = [
        judged([order[i] for i in part], args.users, min(count, len(part)), rng)
        for part, count in zip(parts, each, strict=False)
    ]
    return tokenize_splits(rows[0], rows[1], rows[2], base), [order[i] for i in parts[3][: args.chats]]


def chat(policy: Path, asked: Sequence[Dialogue], args: argparse.Namespace) -> dict[str, Any]:
    """Says the user's lines of each dialogue to `prefmix chat`, as one person of each taste; counts words.

    A piped chat prints answers and nothing else, so `/weights` is asked after each to part them.
    """
    users = [f"u{index:02d}" for index in range(len(TASTES))]
    lines = []
    for user in users:
        for dialogue in asked:
            lines.append(f"/user {user}")  # forgets the conversation, too
            for message in dialogue.messages:
                if message["role"] == "user":
                    lines += [" ".join(message["content"].split()), "/weights"]
    command = [sys.executable, "-m", "prefmix", "chat", str(policy), "--seed", str(args.seed)]
    command += ["--max_new_tokens", str(args.max_new_tokens), "--temperature", "0.7"]
    done = subprocess.run(command, input="\n".join(lines) + "\n/quit\n", capture_output=True, text=True, check=True)
    # Each answer is followed by two lines of weights.
    pieces = re.split(r"^expert 0 +([0-9.]+).*\n^expert 1 .*\n", done.stdout, flags=re.MULTILINE)
    answers, weights = pieces[0:-1:2], [float(value) for value in pieces[1::2]]
    per_user = len(answers) // len(users)
    found: dict[str, Any] = {"command": "prefmix chat POLICY, lines piped in", "answers": len(answers)}
    for index, taste in enumerate(TASTES):
        own = slice(index * per_user, (index + 1) * per_user)
        words = [len(answer.split()) for answer in answers[own]]
        found[taste] = {
            "mean_words": float(np.mean(words)),
            "words": words,
            "weight_of_expert_0": float(np.mean(weights[own])),
            "examples": [answer.strip() for answer in answers[own][:4]],
        }
    return found


def summary(report: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    lines = []
    for name, arm in report["arms"].items():
        figures = arm["personalised"] or arm["population"]
        lines.append(f"{name}: accuracy {figures['accuracy']['mean']:.3f}, log-loss {figures['log_loss']['mean']:.3f}")
    words = {taste: report["chat"][taste]["mean_words"] for taste in TASTES}
    lines.append("words of an answer in prefmix chat: " + ", ".join(f"{t} {w:.1f}" for t, w in words.items()))
    return "\n".join(lines)


def _train(args: argparse.Namespace, arm: Arm, splits: Splits, base: BaseModel) -> TrainedArm:
    options = {
        "latent": "user",
        "cache_dir": str(args.work_dir / "states"),
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "beta": args.beta,
        "sft_weight": args.sft_weight,
    }
    return train_arm(arm, splits, base, options, seed=args.seed, output_dir=args.work_dir / "runs", keep=True)


def _difference(trained: dict[str, TrainedArm]) -> dict[str, Any]:
    mixture, single = (trained[name].report for name in ("mixture", "single DPO"))
    pair = [hits(report.predictions["personalised"].logit) for report in (mixture, single)]
    return paired_difference(pair[0], pair[1], mixture.user)._asdict()


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    kept = {name: value for name, value in vars(args).items() if name not in ("work_dir", "output")}
    return kept | {"model": Path(args.model).name}


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Brief or thorough: dialogues from rows to a chat.")
    parser.add_argument("--model", default="smollm2", help="base model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dialogues", type=int, default=60, help="judged in training; a quarter and a half as many more"
    )
    parser.add_argument("--users", type=int, default=12, help="half of them want brief answers")
    parser.add_argument("--comparisons", type=int, default=12, help="of each user, in training")
    parser.add_argument("--epochs", type=int, default=6, help="the best one on validation dialogues is kept")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--sft-weight", type=float, default=0.5, help="of a supervised term on preferred answers")
    parser.add_argument("--chats", type=int, default=5, help="dialogues that are held with each of two people")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--work-dir", type=Path, default=Path("dialogue"))
    parser.add_argument("--output", type=Path, default=Path("dialogue/results.json"))
    return parser


if __name__ == "__main__":
    main()
