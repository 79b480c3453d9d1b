"""Per-user DPO: an expert for each user, warm-started from single DPO and pulled back to it.

    after each optimizer step   theta_u <- theta_u - min(1, eta s) (theta_u - theta_single)

which is AdamW's decoupled decay with another centre: a Gaussian prior around single DPO. s = 0 lets every user part
freely, s >= 1/eta is single DPO itself. All users train in one run (K = U experts, each row teaching its own user's),
so the base's logits are computed once for all of them. Legend: B rows, U users, M <= U with an expert.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefmix.data.comparisons import ComparisonTable
from prefmix.experts.interface import AbstractExperts
from prefmix.policy.user_state import UserState
from prefmix.training.trainer import MixtureTrainer


class PullToStart(TrainerCallback):
    """Moves all experts towards where they started, after each step of the optimizer."""

    def __init__(self, experts: AbstractExperts, shrinkage: float) -> None:
        self._shrinkage = shrinkage
        self._moving = [parameter for parameter in experts.parameters() if parameter.requires_grad]
        self._start = [parameter.detach().clone() for parameter in self._moving]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Theta <- theta - min(1, eta s) (theta - start)."""
        share = min(1.0, optimizer.param_groups[0]["lr"] * self._shrinkage)
        for parameter, start in zip(self._moving, self._start, strict=True):
            parameter.lerp_(start, share)


class PerUserTrainer(MixtureTrainer):
    """Users are told apart by name: each has the expert of the same number, in held-out figures too."""

    def running_user_state(self) -> UserState:
        """Certainty about every user's expert; users without one of their own weigh all alike."""
        table = self.train_comparisons.table
        log_weights = own_expert_log_weights(self.user_expert, self.args.num_experts)
        return UserState(list(table.users), log_weights, torch.ones(len(log_weights), dtype=torch.float64))

    user_expert: np.ndarray


def users_with_expert(table: ComparisonTable, max_users: int) -> np.ndarray:
    """[U] the expert of each user, 0..M-1, the most active users first; -1 beyond `max_users`."""
    count = np.bincount(table.user[table.user >= 0], minlength=len(table.users))
    order = np.argsort(-count, kind="stable")[: min(max_users, int((count > 0).sum()))]
    expert = np.full(len(table.users), -1)
    expert[order] = np.arange(len(order))
    return expert


def labelled_by_user(table: ComparisonTable, user_expert: np.ndarray) -> ComparisonTable:
    """The rows of users with an expert, whose "true group" is that expert: what `init="labels"` reads."""
    known = (table.user >= 0) & (table.user < len(user_expert))
    expert = np.where(known, user_expert[np.where(known, table.user, 0)], -1)
    names = tuple(str(number) for number in range(int(user_expert.max()) + 1))
    return replace(table, group=expert, groups=names).select(expert >= 0)


def own_expert_log_weights(expert: np.ndarray, num_experts: int) -> Float[Tensor, "B M"]:
    """[B, M] all weight on the row's own expert; equal weights where it has none (-1)."""
    log_weights = torch.full((len(expert), num_experts), -torch.inf, dtype=torch.float64)
    index = torch.from_numpy(np.where(expert >= 0, expert, 0))
    log_weights[torch.arange(len(expert)), index] = 0.0
    log_weights[torch.from_numpy(expert < 0)] = -float(np.log(num_experts))
    return log_weights
