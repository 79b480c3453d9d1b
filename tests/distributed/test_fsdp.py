"""FSDP2 over two processes (gloo): each holds half, and both end where one process with everything ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

NAMES = ("fsdp", "fsdp branches")  # heads; LoRA branches over a LoRA trunk with a cheap M-step


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["whole", "resumed"])
def test_sharded_processes_end_where_one_does(
    two: Path, one: dict[str, Any], runs: ModuleType, name: str, kind: str
) -> None:
    """Parameters, AdamW's moments, evidence, responsibilities, log, and the policy that the first process writes."""
    trainer, metrics, start = one[name]
    expected = runs.ended_with(trainer)
    moved = [float((expected[f"model.{k}"] - v).abs().max()) for k, v in start.items() if k.startswith("experts")]
    assert min(moved) > 0.02
    first, second = (load_file(str(two / f"{name}-{kind}-{rank}.safetensors")) for rank in (0, 1))
    runs.assert_close(first, expected)
    assert all(torch.equal(first[key], second[key]) for key in first)
    report = json.loads((two / f"{name}-{kind}-0.json").read_text())
    for found, line in zip(report["history"], runs.history(trainer), strict=True):
        assert found == pytest.approx(line, rel=1e-4, abs=2e-5)
    assert report["metrics"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    policy = two / f"{name}-{kind}" / "policy"
    weights = trainer.policy.from_pretrained(policy, device="cpu").weights(user="u1")
    torch.testing.assert_close(weights, trainer.policy.weights(user="u1"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_each_process_holds_about_half(two: Path, name: str) -> None:
    shares = [json.loads((two / f"{name}-whole-{rank}.json").read_text())["share"] for rank in (0, 1)]
    assert all(0.4 < share < 0.6 for share in shares)
    assert sum(shares) == pytest.approx(1, abs=0.01)  # the gate stays whole


@pytest.mark.parametrize("name", NAMES)
def test_one_process_goes_on_where_two_stopped(
    two: Path, one: dict[str, Any], runs: ModuleType, tmp_path: Path, name: str
) -> None:
    fields = runs.SCENARIOS[name]
    checkpoint = f"checkpoint-{fields['save_steps']}"
    shutil.copytree(two / f"{name}-whole" / checkpoint, tmp_path / name / checkpoint)
    trainer = runs.make_trainer(tmp_path / name, 1, **fields)
    trainer.train(resume_from_checkpoint=True)
    runs.assert_close(runs.ended_with(trainer), runs.ended_with(one[name][0]))
