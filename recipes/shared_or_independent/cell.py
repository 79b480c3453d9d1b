"""One kind of expert on one base model, in a process of its own: quality, parameters, memory, CPU time.

Legend: B test rows.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefmix.data.planted_tasks import review_groups
from prefmix.evaluation.metrics import hits
from prefmix.evaluation.scoring import Predictions
from prefmix.experiments.baselines import Arm, FittedArm, Splits, fit_arm, tokenize_splits
from prefmix.experiments.seen_vocabulary import seen_vocabulary
from prefmix.experts.base_model import BaseModel, load_base


class Kind(NamedTuple):
    """A way to have K experts, and the rates that validation rows choose from.

    Attributes:
        options: fields of `MixtureConfig`.
        rates: learning rates: as many for every kind, down from the kind's default.
    """

    options: dict[str, Any]
    rates: tuple[float, ...]


KINDS = {
    "heads": Kind({"branch_depth": 0}, (2e-4, 6e-4, 2e-3)),
    "branches, last 2 blocks": Kind({"branch_depth": 2}, (6e-5, 2e-4, 6e-4)),
    "branches, all blocks": Kind({"branch_depth": -1}, (6e-5, 2e-4, 6e-4)),
    # The default, 1e-6, is TRL's for large models; these models are tiny.
    "independent": Kind({"expert_kind": "independent"}, (1e-5, 1e-4, 3e-4)),
}


class Task(NamedTuple):
    """Two opposed groups of review readers (`planted_tasks.review_groups`).

    Attributes:
        users, comparisons: in training.
        num_words: of the end of each review.
        texts_per_side: reviews of each side, 60% of them for training.
        epochs: the best one on validation texts is kept.
        batch_size: comparisons a step.
        seed: of rows, starts and order.
    """

    users: int
    comparisons: int
    num_words: int
    texts_per_side: int
    epochs: int
    batch_size: int
    seed: int


def run_cell(model: str, kind: str, task: Task, folder: Path) -> dict[str, Any]:
    """Trains every rate, keeps the best on validation texts, and scores that one on test texts."""
    rows = review_groups(
        "sentiment",
        num_users=task.users,
        comparisons_per_user=task.comparisons,
        seed=task.seed,
        texts_per_side=task.texts_per_side,
        num_words=task.num_words,
    )
    whole = load_base(model, dtype=torch.float32)
    base, parts = seen_vocabulary([rows.train, rows.validation, rows.test], whole, folder / "base")
    del whole
    splits = tokenize_splits(parts[0], parts[1], parts[2], base)
    found: dict[float, dict[str, Any]] = {}
    best: FittedArm | None = None
    before = peak_memory()
    for rate in KINDS[kind].rates:
        start = time.process_time()
        fitted = _fit(kind, rate, splits, base, task, folder)
        seconds = time.process_time() - start
        found[rate] = {"validation": fitted.validation, "cpu_seconds": round(seconds, 2)}
        if min(fitted.validation) == min(min(entry["validation"]) for entry in found.values()):
            best, chosen = fitted, rate
    assert best is not None
    after = peak_memory()
    return {
        "rate": chosen,
        "epoch": best.epoch,
        "cpu_seconds": found[chosen]["cpu_seconds"],
        "rates": {f"{rate:g}": entry for rate, entry in found.items()},
        "peak_memory_mb": round(after / 1e6, 1),
        "memory_before_mb": round(before / 1e6, 1),
        **_parameters(best, base),
        "test": _scores(best, splits),
    }


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _fit(kind: str, rate: float, splits: Splits, base: BaseModel, task: Task, folder: Path) -> FittedArm:
    """One run; no states are found from an earlier one, so reading them is part of its time."""
    states = folder / "states"
    shutil.rmtree(states, ignore_errors=True)
    options = {
        "num_experts": 2,
        "init": "probe",
        "latent": "user",
        "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "num_train_epochs": task.epochs,
        "per_device_train_batch_size": task.batch_size,
        "token_dropout": 0.5,  # without it all kinds memorise few texts
        "pooling": 0.0,  # as its results were made
        "cache_dir": str(states),
    }
    arm = Arm(f"{kind}-{rate:g}", options | KINDS[kind].options)
    return fit_arm(arm, splits, base, {}, seed=task.seed, output_dir=folder / "runs")


def _parameters(fitted: FittedArm, base: BaseModel) -> dict[str, int]:
    """Numbers that were trained, and what has to be held to serve: those and the base where it is shared."""
    experts = fitted.policy.model.experts
    state = [experts.expert_state(k) for k in range(experts.num_experts)]
    trained = sum(tensor.numel() for expert in state for tensor in expert.values())
    shared = 0 if experts.describe()["kind"] == "independent" else base.model.num_parameters()
    return {"trained_parameters": trained, "served_parameters": trained + shared}


def _scores(fitted: FittedArm, splits: Splits) -> dict[str, Any]:
    from prefmix.evaluation.evaluator import evaluate

    report = evaluate(fitted.policy, splits.test)
    predictions: Predictions = report.predictions["personalised"]
    return {
        "accuracy": report.best.accuracy._asdict(),
        "log_loss": report.best.log_loss._asdict(),
        "ari": None if report.agreement is None else report.agreement.ari,
        "hits": hits(predictions.logit).tolist(),
        "losses": [round(float(value), 4) for value in -predictions.log_prob],
        "user": report.user.tolist(),
    }
