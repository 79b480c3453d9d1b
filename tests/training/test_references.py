"""References computed once: the same training as with references on the fly, without a pass of the base in a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefmix.experts.branches import BranchedExperts
from prefmix.experts.independent import IndependentExperts
from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

KINDS: dict[str, dict[str, Any]] = {
    "all blocks": {"branch_depth": -1},
    "last block": {"branch_depth": 1},
    "trained trunk": {"branch_depth": 1, "trunk": "lora"},
    "whole models": {"expert_kind": "independent", "learning_rate": 1e-3},
    "sampled": {"branch_depth": -1, "m_step": "sampled"},
}


def make_trainer(folder: Path, model: Any, tokenizer: Any, rows: Any, **options: Any) -> MixtureTrainer:
    fields: dict[str, Any] = {
        "num_experts": 2,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "beta": 0.3,
        "seed": 3,
        "init": "random",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    } | options
    if fields.get("expert_kind") != "independent":
        fields["expert_rank"] = 4
    return MixtureTrainer(model, MixtureConfig(str(folder), **fields), train_dataset=rows, processing_class=tokenizer)


def losses(trainer: MixtureTrainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_and_runs_no_reference(
    kind: str,
    make_rows: Callable[..., list[dict[str, Any]]],
    make_tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = make_rows(num_users=8, rows_per_user=4)
    arguments = (make_tiny_model(), tiny_tokenizer, rows)
    on_the_fly = make_trainer(tmp_path / "fly", *arguments, precompute_ref_log_probs=False, **KINDS[kind])
    assert on_the_fly.references is None
    expected = losses(on_the_fly)
    arguments = (make_tiny_model(), tiny_tokenizer, rows)
    known = make_trainer(tmp_path / "known", *arguments, precompute_ref_log_probs=True, **KINDS[kind])
    assert known.references is not None
    assert (known.references[np.unique(known.train_comparisons.table.compared)] < 0).all()

    def refuse(*_: Any) -> Any:
        raise AssertionError("a step ran the reference")

    monkeypatch.setattr(known, "refresh_evidence", lambda: torch.zeros(len(rows), 2))  # the last reading runs it
    monkeypatch.setattr(BranchedExperts, "_reference_log_probs", refuse)
    monkeypatch.setattr(IndependentExperts, "reference_log_probs", refuse)
    assert losses(known) == pytest.approx(expected, abs=2e-5)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"branch_depth": -1, "num_train_epochs": 2}, True),
        ({"branch_depth": -1, "num_train_epochs": 1}, False),
        ({"branch_depth": -1, "num_train_epochs": 3, "max_steps": 5}, False),
        ({"branch_depth": -1, "num_train_epochs": 2, "token_dropout": 0.5}, False),
        ({"branch_depth": 4, "num_train_epochs": 2}, False),
        ({"branch_depth": 4, "trunk": "full", "num_train_epochs": 2}, True),
        ({"expert_kind": "independent", "num_train_epochs": 2}, True),
        ({"num_train_epochs": 2}, False),
    ],
)
def test_null_means_where_it_pays(options: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    assert MixtureConfig(str(tmp_path), use_cpu=True, **options).precompute_ref_log_probs is expected


@pytest.mark.parametrize("options", [{}, {"branch_depth": -1, "token_dropout": 0.5}])
def test_refuses_where_it_cannot_be_right_or_saves_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precompute_ref_log_probs=true"):
        MixtureConfig(str(tmp_path), use_cpu=True, precompute_ref_log_probs=True, **options)
