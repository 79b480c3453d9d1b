"""The models that a mixture is compared with, trained by the same trainer on the same rows and cached states.

Legend: B comparisons, U users, K experts, G true groups.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PrinterCallback

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.tokenization import tokenize_rows
from prefmix.evaluation.evaluator import evaluate
from prefmix.evaluation.report import EvaluationReport
from prefmix.experiments.arms import Arm, standard_arms
from prefmix.experts.base_model import BaseModel
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.config import MixtureConfig
from prefmix.training.setup import trunk_states
from prefmix.training.trainer import MixtureTrainer

__all__ = [
    "Arm",
    "FittedArm",
    "Splits",
    "TrainedArm",
    "fit_arm",
    "standard_arms",
    "table_states",
    "tokenize_splits",
    "train_arm",
]

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]

# By validation log-loss, alike for all arms: a score of training rows says nothing about new texts.
CHOOSE_EPOCH = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}
KEEP_LAST = {"eval_strategy": "no", "save_strategy": "no"}


class Splits(NamedTuple):
    """Tables whose users and groups have the same indices.

    Attributes:
        train: what every arm trains on.
        validation: chooses the epoch; None: the last epoch is kept.
        test: what is reported.
        new_users: comparisons of people whom training does not see, or None.
    """

    train: ComparisonTable
    validation: ComparisonTable | None
    test: ComparisonTable
    new_users: ComparisonTable | None = None


def tokenize_splits(
    train: Rows,
    validation: Rows | None,
    test: Rows,
    base: BaseModel,
    *,
    new_users: Rows | None = None,
    max_length: int | None = 1024,
) -> Splits:
    """Tokenizes rows with the user and group indices of the training rows."""
    assert base.tokenizer is not None
    tokenizer = base.tokenizer
    first = tokenize_rows(train, tokenizer, max_length=max_length, progress=False)

    def like_first(rows: Rows) -> ComparisonTable:
        return tokenize_rows(
            rows, tokenizer, max_length=max_length, users=first.users, groups=first.groups, progress=False
        )

    further = [None if rows is None else like_first(rows) for rows in (validation, new_users)]
    return Splits(first, further[0], like_first(test), further[1])


class TrainedArm(NamedTuple):
    """A trained model and what it is worth.

    Attributes:
        policy: at the chosen epoch.
        report: on the test rows.
        epoch: the epoch with the lowest validation log-loss; 0 without validation rows.
        validation: log-loss on the validation rows after each epoch, nats.
        folder: checkpoints, `metrics.jsonl` and `policy`, where they were kept.
    """

    policy: MixturePolicy
    report: EvaluationReport
    epoch: int
    validation: list[float]
    folder: Path


def train_arm(
    arm: Arm,
    splits: Splits,
    base: BaseModel,
    options: Mapping[str, Any],
    *,
    seed: int,
    output_dir: str | Path,
    keep: bool = False,
) -> TrainedArm:
    """Trains one arm and keeps the epoch with the lowest validation log-loss; the same rule for every arm.

    Args:
        arm: what to train.
        splits: the tables.
        base: the base model.
        options: fields of `MixtureConfig` for all arms; the arm's own fields win.
        seed: of heads, order and starts.
        output_dir: folder of all runs; the arm gets a folder within.
        keep: keep the arm's folder.
    """
    fitted = fit_arm(arm, splits, base, options, seed=seed, output_dir=output_dir, keep=keep)
    states = table_states(splits.test, base, {**options, **arm.options})
    report = evaluate(fitted.policy, splits.test, states=states, name=arm.name, true_groups=arm.true_groups, seed=seed)
    return TrainedArm(fitted.policy, report, fitted.epoch, fitted.validation, fitted.folder)


class FittedArm(NamedTuple):
    """A trained model, before anything is reported of it.

    Attributes:
        policy: at the chosen epoch.
        epoch: the epoch with the lowest validation log-loss; 0 without validation rows.
        validation: log-loss on the validation rows after each epoch, nats.
        folder: checkpoints, `metrics.jsonl` and `policy`, where they were kept.
    """

    policy: MixturePolicy
    epoch: int
    validation: list[float]
    folder: Path


def fit_arm(
    arm: Arm,
    splits: Splits,
    base: BaseModel,
    options: Mapping[str, Any],
    *,
    seed: int,
    output_dir: str | Path,
    keep: bool = False,
    trainer_class: type[MixtureTrainer] = MixtureTrainer,
    prepare: Callable[[MixtureTrainer], None] | None = None,
) -> FittedArm:
    """`train_arm` without the test rows.

    Args:
        arm: what to train.
        splits: the tables; test rows are not read.
        base: the base model.
        options: fields of `MixtureConfig` for all arms; the arm's own fields win.
        seed: of heads, order and starts.
        output_dir: folder of all runs; the arm gets a folder within.
        keep: keep the arm's folder.
        trainer_class: a trainer of the same arguments.
        prepare: called with the trainer before it trains.
    """
    folder = Path(output_dir) / f"{arm.name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    args = _config(folder, {"seed": seed, "latent": "user"} | dict(options) | dict(arm.options), splits)
    trainer = trainer_class(base, args, train_dataset=splits.train, eval_dataset=splits.validation)
    trainer.remove_callback(PrinterCallback)
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    policy = trainer.policy
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    logger.info("%s, seed %d: validation log-loss %s", arm.name, seed, losses)
    return FittedArm(policy, int(np.argmin(losses)) + 1 if losses else 0, losses, folder)


def table_states(table: ComparisonTable, base: BaseModel, options: Mapping[str, Any]) -> TrunkStates:
    """Cached trunk states of a table's texts, as an arm with these options reads them."""
    return trunk_states(table, base, _config(Path("unused"), options, Splits(table, None, table)))


def _config(folder: Path, options: Mapping[str, Any], splits: Splits) -> MixtureConfig:
    choose: dict[str, Any] = KEEP_LAST if splits.validation is None else CHOOSE_EPOCH
    common: dict[str, Any] = {
        "logging_strategy": "epoch",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "overwrite_output_dir": True,
    }
    return MixtureConfig(str(folder), **(common | choose | dict(options)))
