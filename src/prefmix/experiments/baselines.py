"""The models that a mixture is compared with, trained by the same trainer on the same rows and cached states.

Legend: B comparisons, U users, K experts, G true groups.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PrinterCallback

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.tokenization import tokenize_rows
from prefmix.evaluation.evaluator import evaluate
from prefmix.evaluation.report import EvaluationReport
from prefmix.experts.base_model import BaseModel
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.config import MixtureConfig
from prefmix.training.setup import trunk_states
from prefmix.training.trainer import MixtureTrainer

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


@dataclass(frozen=True)
class Arm:
    """One model to train.

    Attributes:
        name: in tables and folder names.
        options: fields of `MixtureConfig` that make it what it is.
        true_groups: evaluated with the row's true group instead of a posterior (the oracle).
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    true_groups: bool = False


def standard_arms(num_experts: int, num_groups: int | None) -> dict[str, Arm]:
    """Single DPO, the mixture, the mixture from a random start, and per-group DPO where true groups exist.

    Args:
        num_experts: K of the mixtures.
        num_groups: G, or None where rows name no group.
    """
    arms = [
        Arm("single DPO", {"num_experts": 1, "init": "random"}),
        Arm("mixture", {"num_experts": num_experts, "init": "probe"}),
        Arm("mixture, random start", {"num_experts": num_experts, "init": "random"}),
    ]
    if num_groups is not None:
        # Responsibilities stay at the true groups to the end: each expert is DPO on the rows of its group.
        oracle = {"num_experts": num_groups, "init": "labels", "init_hold_epochs": 1e6}
        arms.append(Arm("oracle", oracle, true_groups=True))
    return {arm.name: arm for arm in arms}


class Splits(NamedTuple):
    """Tables whose users and groups have the same indices.

    Attributes:
        train: what every arm trains on.
        validation: chooses the epoch; None: the last epoch is kept.
        test: what is reported.
    """

    train: ComparisonTable
    validation: ComparisonTable | None
    test: ComparisonTable


def tokenize_splits(
    train: Rows,
    validation: Rows | None,
    test: Rows,
    base: BaseModel,
    *,
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

    return Splits(first, None if validation is None else like_first(validation), like_first(test))


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
    folder = Path(output_dir) / f"{arm.name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    args = _config(folder, {"seed": seed, "latent": "user"} | dict(options) | dict(arm.options), splits)
    trainer = MixtureTrainer(base, args, train_dataset=splits.train, eval_dataset=splits.validation)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    policy, states = trainer.policy, trunk_states(splits.test, base, args)
    report = evaluate(policy, splits.test, states=states, name=arm.name, true_groups=arm.true_groups, seed=seed)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    logger.info("%s, seed %d: validation log-loss %s", arm.name, seed, losses)
    return TrainedArm(policy, report, int(np.argmin(losses)) + 1 if losses else 0, losses, folder)


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
