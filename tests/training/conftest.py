"""Runs small enough for a test: a tiny Llama, rows of two opposed groups of users, and a factory of trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

GOOD = ["great", "loved", "blue", "the film was great", "I loved the film", "sky is blue"]
BAD = ["bad", "hated", "green", "the film was bad", "I hated the film", "sky is green"]


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
