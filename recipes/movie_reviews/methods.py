"""What is trained on the annotators' comparisons, each with the same search over learning rates and epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefmix.experiments.baselines import Arm, Rows, Splits, TrainedArm, tokenize_splits, train_arm
from prefmix.experts.base_model import BaseModel
from prefmix.mixture.alignment import assign
from prefmix.policy.mixture_policy import MixturePolicy

SINGLE, MIXTURE, FIXED, ORACLE, ANONYMOUS = (
    "single DPO", "mixture", "mixture, fixed weights", "oracle", "anonymous mixture",
)  # fmt: skip


class Comparisons(NamedTuple):
    """Rows of the same annotators over the three disjoint sets of reviews."""

    train: Rows
    validation: Rows
    test: Rows

    def without_ids(self) -> Comparisons:
        """The same rows as anonymous pairs: no `user`; `group` stays for evaluation alone."""
        return Comparisons(
            *([{k: v for k, v in row.items() if k != "user"} for row in rows] for rows in self)  # type: ignore[arg-type]
        )


def methods(num_objectives: int) -> dict[str, Arm]:
    """Single DPO on the union, mixtures that see user ids, per-objective DPO, and the mixture that sees nobody."""
    many = {"num_experts": num_objectives, "pooling": 0.0}  # as its results were made
    arms = [
        Arm(SINGLE, {"num_experts": 1, "init": "random"}),
        Arm(MIXTURE, many | {"init": "probe"}),
        Arm(FIXED, many | {"init": "probe", "gate_update": "fixed"}),
        Arm(ORACLE, many | {"init": "labels", "init_hold_epochs": 1e6}, true_groups=True),
        Arm(ANONYMOUS, many | {"latent": "pair", "init": "auto"}),
    ]
    return {arm.name: arm for arm in arms}


class Choice(NamedTuple):
    """A method at the learning rate and epoch with the lowest validation log-loss.

    Attributes:
        trained: policy and report on the test rows.
        rate: learning rate.
        tried: rate -> validation log-loss after each epoch, nats.
    """

    trained: TrainedArm
    rate: float
    tried: dict[str, list[float]]


def train_method(
    arm: Arm,
    rates: Sequence[float],
    comparisons: Comparisons,
    base: BaseModel,
    options: Mapping[str, Any],
    *,
    seed: int,
    folder: Path,
) -> Choice:
    """Trains an arm at every rate and keeps the best by validation log-loss; alike for every arm."""
    rows = comparisons.without_ids() if arm.name == ANONYMOUS else comparisons
    splits: Splits = tokenize_splits(rows.train, rows.validation, rows.test, base)
    best: tuple[float, TrainedArm, float] | None = None
    tried = {}
    for rate in rates:
        trained = train_arm(arm, splits, base, {**options, "learning_rate": rate}, seed=seed, output_dir=folder)
        tried[f"{rate:g}"] = [round(loss, 5) for loss in trained.validation]
        if best is None or min(trained.validation) < best[0]:
            best = min(trained.validation), trained, rate
    assert best is not None, "at least one rate"
    return Choice(best[1], best[2], tried)


def expert_of_objective(policy: MixturePolicy, rows: Rows, objectives: Sequence[str]) -> list[int]:
    """Which expert serves each objective: the assignment with the largest posterior of its annotators.

    Read by evaluation alone, to know which weights mean "this objective". Without user ids the posterior of a row's
    annotator is the gate, so experts are told apart by the probability that they give the objective's rows.
    """
    table = torch.zeros(len(objectives), policy.config.num_experts, dtype=torch.float64)
    if policy.config.latent == "pair":
        for row, scored in zip(rows, policy.score(rows), strict=True):
            table[list(objectives).index(row["group"])] += torch.tensor(scored["probabilities"]).double().log()
    else:
        group = {str(row["user"]): str(row["group"]) for row in rows}
        for user, name in group.items():
            table[list(objectives).index(name)] += policy.weights(user=user).double()
    return assign(table).tolist()  # type: ignore[no-any-return]
