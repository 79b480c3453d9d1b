"""Confirms a choice of K on trained experts: held-out users' evidence under heads, for the probe's best two K.

Legend: B comparisons, U held-out users, K experts.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from prefmix.data.comparisons import ComparisonTable
from prefmix.evaluation.report import finite
from prefmix.evaluation.scoring import score_rows
from prefmix.experiments.baselines import KEEP_LAST
from prefmix.experiments.choose_k import Choice
from prefmix.experts.base_model import BaseModel
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.mixture.posterior import group_log_lik, posterior
from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

HELD_OUT_SHARE = 0.25


class Confirmation(NamedTuple):
    """Trained experts' evidence of users whom no training row names.

    Attributes:
        num_experts: the smaller K unless the larger one is better by more than one standard error.
        held_out: K -> mean evidence of a held-out user, nats.
        difference: larger K's evidence minus the smaller one's, mean over users, nats.
        standard_error: of the difference, over users.
        num_users: held-out users.
    """

    num_experts: int
    held_out: dict[int, float]
    difference: float
    standard_error: float
    num_users: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return finite(self._asdict())

    def text(self) -> str:
        """One line."""
        each = ", ".join(f"K = {k}: {value:.3f}" for k, value in self.held_out.items())
        return (
            f"trained experts, evidence of {self.num_users} held-out users, nats: {each}; difference "
            f"{self.difference:+.3f} +- {self.standard_error:.3f}: train {self.num_experts}"
        )


def best_two(choice: Choice) -> tuple[int, int]:
    """The chosen K and the best of the others by held-out evidence, by rising K."""
    others = [c for c in choice.candidates if c.num_experts != choice.num_experts]
    runner_up = max(others, key=lambda c: c.held_out).num_experts
    return min(choice.num_experts, runner_up), max(choice.num_experts, runner_up)


def confirm(
    table: ComparisonTable,
    states: TrunkStates,
    base: BaseModel,
    counts: Sequence[int],
    options: Mapping[str, Any],
    *,
    output_dir: str | Path,
    seed: int = 0,
) -> Confirmation:
    """Trains heads for two values of K on three quarters of the users, and scores the other quarter.

    Args:
        table: comparisons of named users.
        states: cached trunk states of its texts.
        base: the base model.
        counts: two values of K, rising.
        options: fields of `MixtureConfig` for both.
        output_dir: folder of the runs, which are removed.
        seed: of the users that are held out, and of training.
    """
    users = np.unique(table.user)
    drawn = np.random.default_rng(seed).permutation(users)[: max(1, round(HELD_OUT_SHARE * len(users)))]
    is_test = np.isin(table.user, drawn)
    train, test = table.select(~is_test), table.select(is_test)
    evidence = {}
    for num_experts in counts:
        folder = Path(output_dir) / f"confirm-{num_experts}"
        common: dict[str, Any] = {
            "disable_tqdm": True,
            "overwrite_output_dir": True,
            "latent": "user",
            "seed": seed,
        } | KEEP_LAST
        args = MixtureConfig(str(folder), **(common | dict(options) | {"num_experts": num_experts}))
        trainer = MixtureTrainer(base, args, train_dataset=train)
        trainer.train()
        evidence[num_experts] = _evidence(trainer, test, states)[drawn]
        shutil.rmtree(folder, ignore_errors=True)
    smaller, larger = counts
    difference = evidence[larger] - evidence[smaller]
    error = float(difference.std(ddof=1) / np.sqrt(len(drawn))) if len(drawn) > 1 else float("inf")
    better = float(difference.mean()) > error
    means = {k: float(value.mean()) for k, value in evidence.items()}
    return Confirmation(larger if better else smaller, means, float(difference.mean()), error, len(drawn))


def _evidence(trainer: MixtureTrainer, test: ComparisonTable, states: TrunkStates) -> np.ndarray:
    """[U] log sum_k w_k prod_i p_ik of every user under the trained experts and their population's weights."""
    policy = trainer.policy
    config = policy.config
    scores = score_rows(policy.model.experts, test, beta=config.beta, feedback=config.feedback_model, states=states)
    grouped = group_log_lik(
        scores.log_lik, torch.from_numpy(test.user), len(test.users), torch.from_numpy(test.weight).double()
    )
    log_weights = policy.model.gate.population_log_weights().detach().cpu().double()
    return posterior(log_weights.expand(len(test.users), -1), grouped).log_evidence.numpy()
