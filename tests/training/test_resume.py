"""Runs that are interrupted anywhere end with the same bits; finished runs stay as they are (figure 7, a small part).

The kills and the damage are those of benchmarks/crash.py, which runs 40 kills.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.training.conftest import Interrupt
from transformers import EarlyStoppingCallback

from prefmix.training import checkpoint
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]


@pytest.fixture(scope="module")
def crash() -> ModuleType:
    """benchmarks/crash.py as a module."""
    file = Path(__file__).parents[2] / "benchmarks" / "crash.py"
    spec = importlib.util.spec_from_file_location("prefmix_crash_benchmark", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trials run in forked processes")
def test_killed_runs_end_with_the_same_bits(crash: ModuleType, tmp_path: Path) -> None:
    reference = crash.report_of(lambda report: crash.train_to_the_end(tmp_path / "reference", report), tmp_path)
    assert reference["steps"] == 12
    trials = crash.run_kills(4, 7, tmp_path, reference | {"whole_seconds": reference["seconds"]})
    assert all(trial["killed"] and trial["equal"] for trial in trials), trials


def interrupted_and_resumed(make_trainer: Make, run_dir: Path, step: int, **fields: Any) -> MixtureTrainer:
    with pytest.raises(KeyboardInterrupt):
        make_trainer(run_dir, callbacks=[Interrupt(step)], **fields).train()
    trainer = make_trainer(run_dir, **fields)
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize(
    "fields",
    [
        {"latent": "pair", "gate": ["global", "user"], "estep": "gumbel", "estep_temperature": 2.0},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "init_hold_epochs": 1.5},
        {"group_texts": True, "lr_scheduler_type": "cosine"},
    ],
    ids=["pair", "accumulation", "grouped"],
)
def test_a_run_interrupted_within_an_epoch_continues_bit_for_bit(
    make_trainer: Make, crash: ModuleType, rows: Any, tmp_path: Path, fields: dict[str, Any]
) -> None:
    fields = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, **fields}
    whole = make_trainer(tmp_path / "whole", eval_data=rows[:8], logging_steps=3, **fields)
    whole.train()
    resumed = interrupted_and_resumed(make_trainer, tmp_path / "cut", 6, eval_data=rows[:8], **fields, logging_steps=3)
    assert crash.digest(resumed) == crash.digest(whole)


def test_early_stopping_counts_on_after_a_resume(make_trainer: Make, rows: Any, tmp_path: Path) -> None:
    fields = {
        "eval_data": rows, "eval_strategy": "epoch", "num_train_epochs": 9, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "learning_rate": 20.0, "save_total_limit": None,
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", callbacks=[EarlyStoppingCallback(3)], **fields)
    steps = whole.train().global_step
    assert steps < 54
    with pytest.raises(KeyboardInterrupt):
        cut = [EarlyStoppingCallback(3), Interrupt(steps - 5)]
        make_trainer(tmp_path / "cut", callbacks=cut, **fields).train()
    resumed = make_trainer(tmp_path / "cut", callbacks=[EarlyStoppingCallback(3)], **fields)
    assert resumed.train(resume_from_checkpoint=True).global_step == steps


@pytest.fixture(scope="module")
def finished(crash: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with checkpoints 9 and 12."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    crash.make_trainer(run_dir).train()
    return run_dir


@pytest.mark.parametrize("kind", range(19))
def test_every_kind_of_damage_is_named_and_passed_over(
    crash: ModuleType, finished: Path, tmp_path: Path, kind: int
) -> None:
    assert len(crash.DAMAGES) == 19
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    assert crash.named_and_passed_over(run_dir, crash.DAMAGES[kind]), crash.DAMAGES[kind].name


def test_resuming_a_finished_run_changes_nothing(crash: ModuleType, finished: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    trainer = crash.make_trainer(finished)
    trainer.training_step = None  # type: ignore[assignment]  # any step would fail
    output = trainer.train(resume_from_checkpoint=True)
    trainer.evaluate()
    assert output.global_step == 12
    assert output.training_loss == json.loads((finished / "finished.json").read_text())["train_loss"]
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before
    saved = crash.make_trainer(finished).policy.from_pretrained(finished, device="cpu")
    assert trainer.policy.weights(user="u1").tolist() == pytest.approx(saved.weights(user="u1").tolist())


def test_a_run_killed_between_its_last_step_and_its_policy_takes_no_step_more(
    crash: ModuleType, finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / "finished.json").unlink()
    shutil.rmtree(run_dir / "policy")
    trainer = crash.make_trainer(run_dir)
    trainer.training_step = None  # type: ignore[assignment]
    assert trainer.train(resume_from_checkpoint=True).global_step == 12
    whole = crash.make_trainer(finished)
    whole.train(resume_from_checkpoint=True)
    assert crash.digest(trainer) == crash.digest(whole)


def test_a_longer_plan_continues_a_finished_run(crash: ModuleType, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    assert crash.make_trainer(run_dir, num_train_epochs=3).train(resume_from_checkpoint="auto").global_step == 18


def test_max_steps_within_an_epoch_are_not_exceeded(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", max_steps=8)
    assert trainer.train().global_step == 8
    (tmp_path / "run" / "finished.json").unlink()
    again = make_trainer(tmp_path / "run", max_steps=8)
    assert again.train(resume_from_checkpoint=True).global_step == 8


def test_a_fresh_run_never_overwrites_another(make_trainer: Make, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_trainer(run_dir).train()
    with pytest.raises(
        ValueError, match=r"holds a finished run .*resume_from_checkpoint=True.*overwrite_output_dir=True"
    ):
        make_trainer(run_dir).train()
    (run_dir / "finished.json").unlink()
    with pytest.raises(ValueError, match="holds an unfinished run"):
        make_trainer(run_dir).train()
    assert make_trainer(run_dir, overwrite_output_dir=True, num_train_epochs=1).train().global_step == 6
    assert [path.name for path in checkpoint.checkpoints(run_dir)] == ["checkpoint-6"]


def test_what_cannot_be_resumed_is_said_clearly(make_trainer: Make, make_rows: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(ValueError, match="there is no checkpoint to resume from"):
        make_trainer(run_dir).train(resume_from_checkpoint=True)
    make_trainer(run_dir, num_train_epochs=1).train(resume_from_checkpoint="auto")
    with pytest.raises(ValueError, match="data_sha256 was"):
        make_trainer(run_dir, data=make_rows(seed=1)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="expert_rank was 2, now 3"):
        make_trainer(run_dir, expert_rank=3).train(resume_from_checkpoint=True)
    (run_dir / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-6.*damaged \(optimizer.pt is missing\)"):
        make_trainer(run_dir).train(resume_from_checkpoint=str(run_dir / "checkpoint-6"))
