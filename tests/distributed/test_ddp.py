"""Two processes (gloo, DistributedDataParallel) end where one process with the same global batches ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

NAMES = ("user", "pair", "robust")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["whole", "resumed"])
def test_two_processes_end_where_one_does(
    two: Path, one: dict[str, Any], runs: ModuleType, name: str, kind: str
) -> None:
    """Parameters, AdamW's moments, evidence of every row and responsibilities, on both processes."""
    trainer, _, start = one[name]
    expected = runs.ended_with(trainer)
    moved = [float((expected[f"model.{k}"] - v).abs().max()) for k, v in start.items() if k.startswith("experts")]
    assert min(moved) > 0.03
    first, second = (load_file(str(two / f"{name}-{kind}-{rank}.safetensors")) for rank in (0, 1))
    runs.assert_close(first, expected)
    for key in first:  # not close but equal: nothing may drift apart
        assert torch.equal(first[key], second[key]), key
    if name == "user":
        assert first["em.visited"].all() and first["em.table"].shape == (runs.ROWS, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["whole", "resumed"])
def test_the_log_is_of_all_processes(two: Path, one: dict[str, Any], runs: ModuleType, name: str, kind: str) -> None:
    trainer, metrics, _ = one[name]
    reports = [json.loads((two / f"{name}-{kind}-{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1]
    lines = runs.history(trainer)
    assert len(lines) == len(reports[0]["history"])
    for found, expected in zip(reports[0]["history"], lines, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-5)
    for key in ("eval_loss", "eval_population_loss", "eval_accuracy"):
        assert reports[0]["metrics"][key] == pytest.approx(metrics[key], rel=1e-4)
    written = [json.loads(line) for line in (two / f"{name}-{kind}" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [line["step"] for line in reports[0]["history"]][: len(written)]
    assert (two / f"{name}-{kind}" / "policy" / "mixture_config.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_one_process_goes_on_where_two_stopped(
    two: Path, one: dict[str, Any], runs: ModuleType, tmp_path: Path, name: str
) -> None:
    fields = runs.SCENARIOS[name]
    checkpoint = f"checkpoint-{fields['save_steps']}"
    shutil.copytree(two / f"{name}-whole" / checkpoint, tmp_path / name / checkpoint)
    trainer = runs.make_trainer(tmp_path / name, 1, **fields)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    runs.assert_close(runs.ended_with(trainer), runs.ended_with(one[name][0]))
    for found, expected in zip(runs.history(trainer), runs.history(one[name][0])):
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-5)


def test_a_checkpoint_is_written_once(two: Path, runs: ModuleType) -> None:
    """By the first process, but for the random state of each; and the states of the trunk once for both."""
    files = {file.name for file in (two / "user-whole" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainable.safetensors", "manifest.json"} <= files
    assert len([name for name in files if name.startswith("optimizer")]) == 1
    caches = [path for path in (two / "cache").iterdir() if path.is_dir()]
    assert len(caches) == 2  # training rows and held-out rows
