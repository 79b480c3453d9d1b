"""What can be known from the configuration alone is said before anything is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmix.training.config import MixtureConfig
from prefmix.training.early_warnings import slow_rate
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]


@pytest.mark.parametrize(
    "fields, slow",
    [
        ({}, None),
        ({"learning_rate": 5e-6}, "heads start at zero.*leave it out .0.001"),
        ({"learning_rate": 1e-4}, None),
        ({"branch_depth": -1, "learning_rate": 1e-6}, "LoRA branches start at zero.*leave it out .0.0002"),
        ({"branch_depth": 2, "learning_rate": 5e-5}, None),
        ({"trunk": "lora", "learning_rate": 1e-6}, None),
        ({"trunk": "full", "learning_rate": 1e-6}, None),
        ({"expert_kind": "independent", "learning_rate": 1e-6}, None),
        ({"init_experts": ["earlier/policy"], "learning_rate": 1e-6}, None),
    ],
)
def test_rates_for_whole_models_are_too_small_for_what_starts_at_zero(
    fields: dict[str, Any], slow: str | None, tmp_path: Path
) -> None:
    said = slow_rate(vars(MixtureConfig(str(tmp_path), use_cpu=True, **fields)))
    assert (said is None) == (slow is None)
    assert slow is None or re.search(slow, str(said))


def test_a_slow_rate_and_an_old_run_are_said_before_anything_is_read(
    make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(max_steps=1).train()
    assert not caplog.records
    unread = [{"prompt": "a row that cannot be used"}]
    with caplog.at_level(logging.WARNING, "prefmix"), pytest.raises(ValueError, match="chosen"):
        make_trainer(data=unread, learning_rate=5e-6)
    old, slow = (record.getMessage() for record in caplog.records)
    assert "train() will refuse" in old and str(tmp_path / "run") in old and "overwrite_output_dir=True" in old
    assert "learning_rate=5e-06" in slow
    caplog.clear()
    for wanted in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}, {"output_dir": tmp_path / "b"}):
        make_trainer(**wanted)
    assert not caplog.records
    assert make_trainer(max_steps=1).train(resume_from_checkpoint=True).global_step == 1, "built all the same"


def test_train_refuses_before_it_does_anything(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(max_steps=1).train()
    again = make_trainer(max_steps=1)
    monkeypatch.setattr(again, "get_train_dataloader", None)
    with pytest.raises(ValueError, match="holds a finished run"):
        again.train()
