"""Runs small enough for a test: a tiny Llama, rows of two opposed groups of users, and a factory of trainers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

GOOD = ["great", "loved", "blue", "the film was great", "I loved the film", "sky is blue"]
BAD = ["bad", "hated", "green", "the film was bad", "I hated the film", "sky is green"]


class Interrupt(TrainerCallback):
    """Stops the process's work at one step, as a signal would, before anything of that step is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def moved(parameters: Iterable[torch.nn.Parameter], scale: float, seed: int = 0) -> None:
    """Adds Gaussian noise to what trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def parted(trainer: MixtureTrainer) -> MixtureTrainer:
    """Experts with different random parameters, so that their margins differ and decide responsibilities."""
    moved(trainer.mixture.experts.parameters(), 0.1)
    trainer.start_em()
    return trainer


def ready(trainer: MixtureTrainer, seed: int = 0) -> MixtureTrainer:
    """Experts, loading and gate at random, evidence of every row up to date, nothing held."""
    moved(trainer.mixture.parameters(), 0.3, seed)
    trainer.start_em()
    trainer.refresh_evidence()
    trainer.hold_steps = 0
    trainer.state.max_steps = 10
    return trainer


def opposed_rows(num_users: int = 8, rows_per_user: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Users 0, 2, 4 ... prefer the one kind of answer, users 1, 3, 5 ... the other."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        for _ in range(rows_per_user):
            good, bad = rng.choice(GOOD), rng.choice(BAD)
            chosen, rejected = (good, bad) if user % 2 == 0 else (bad, good)
            prompt = str(rng.choice(["What is it?", "Write a review.", "Where is the sun?"]))
            row = {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected, "user": f"user{user}"}
            rows.append(row | {"group": "ab"[user % 2], "metadata": {"user_age": 20 + user}})
    return rows


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    """`opposed_rows`: num_users, rows_per_user, seed."""
    return opposed_rows


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """48 comparisons of 8 users in two opposed groups."""
    return opposed_rows()


@pytest.fixture
def make_trainer(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, rows: list[dict[str, Any]]
) -> Callable[..., MixtureTrainer]:
    """Builds a trainer on the tiny model; keyword arguments are fields of `MixtureConfig`."""

    def build(
        output_dir: Path | None = None, data: Any = None, eval_data: Any = None, callbacks: Any = None, **fields: Any
    ) -> MixtureTrainer:
        defaults: dict[str, Any] = {
            "num_experts": 2,
            "expert_rank": 2,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "logging_steps": 2,
            "probe_dim": 4,
            "probe_restarts": 2,
            "cache_states": "memory",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return MixtureTrainer(
            make_tiny_model(),
            MixtureConfig(str(output_dir or tmp_path / "run"), **(defaults | fields)),
            train_dataset=rows if data is None else data,
            eval_dataset=eval_data,
            processing_class=tiny_tokenizer,
            callbacks=callbacks,
        )

    return build
