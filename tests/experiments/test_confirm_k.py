"""Held-out users' evidence of trained experts is that of the likelihood they were trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefmix.evaluation.scoring import score_rows
from prefmix.experiments.confirm_k import _evidence
from prefmix.experts.base_model import BaseModel
from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer


def trainer_of(base: BaseModel, rows: list[dict[str, Any]], folder: Path, **fields: Any) -> MixtureTrainer:
    options: dict[str, Any] = {"num_experts": 2, "latent": "user", "cache_states": "memory", "use_cpu": True}
    options |= {"disable_tqdm": True, "probe_dim": 4, "init": "random", **fields}
    trainer = MixtureTrainer(base, MixtureConfig(str(folder), **options), train_dataset=rows)
    with torch.no_grad():  # heads start at zero, where noise changes nothing
        for parameter in trainer.mixture.experts.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return trainer


def rows_of(num_users: int = 4, per_user: int = 5) -> list[dict[str, Any]]:
    words = ["sky", "sea", "film", "girl", "time"]
    return [
        {
            "prompt": "A review:",
            "chosen": f" I loved the {words[i]}",
            "rejected": f" {words[i - u]} bad",
            "user": f"u{u}",
        }
        for u in range(num_users)
        for i in range(per_user)
    ]


def test_label_noise_is_in_the_evidence(tiny_base: BaseModel, tmp_path: Path) -> None:
    """Sum over rows of log[(1 - e) sigmoid(m) + e sigmoid(-m)], mixed by the gate, user by user."""
    noise = 0.2
    trainer = trainer_of(tiny_base, rows_of(), tmp_path, label_noise=noise, beta=1.0)
    data = trainer.train_comparisons
    clean = score_rows(trainer.mixture.experts, data.table, beta=(1.0, 1.0), states=data.states)
    margin = clean.log_lik - clean.log_lik_reversed
    noisy = torch.log((1 - noise) * torch.sigmoid(margin) + noise * torch.sigmoid(-margin))
    user = torch.from_numpy(data.table.user)
    each = torch.stack([noisy[user == u].sum(dim=0) for u in range(4)])
    weights = trainer.mixture.gate.population_log_weights().double()
    expected = torch.logsumexp(weights + each, dim=1)
    assert margin.abs().max() > 0.5, "nothing that noise could change"
    assert data.states is not None
    assert torch.from_numpy(_evidence(trainer, data.table, data.states)) == pytest.approx(expected, rel=1e-5)
