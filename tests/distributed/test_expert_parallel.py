"""Experts on processes of their own (two, gloo) end where one process with all experts ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

NAMES = ("parallel", "parallel gates")
OWN = ((0, 2), (1,))  # expert k lives on process k mod 2


@pytest.fixture(scope="module")
def two(launch: Callable[..., str], runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have run everything: whole, resumed, and continued from where one process was."""
    folder = tmp_path_factory.mktemp("two")
    alone = runs.make_trainer(folder / "parallel-one", 1, **runs.SCENARIOS["parallel"], expert_parallel=True)
    alone.train()
    launch(runs.__file__, folder, *NAMES, "parallel draws")
    return folder


def _ends(folder: Path, name: str, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    first, second = (load_file(str(folder / f"{name}-{kind}-{rank}.safetensors")) for rank in (0, 1))
    return first, second


def _reports(folder: Path, name: str, kind: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}-{kind}-{rank}.json").read_text()) for rank in (0, 1)]


def _experts_in(names: Any) -> set[int]:
    return {int(name.split(".")[0].removeprefix("expert_")) for name in names if name.startswith("expert_")}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in NAMES for kind in ("whole", "resumed")] + [("parallel", "continued")]
)
def test_experts_end_where_one_process_takes_them(
    two: Path, one: dict[str, Any], runs: ModuleType, name: str, kind: str
) -> None:
    """Weights and moments of every expert, gate, evidence of every row, responsibilities."""
    trainer, _, start = one[name]
    moved = [float((trainer._trained_tensors()[k] - v).abs().max()) for k, v in start.items() if "models" in k]
    assert min(moved) > 0.01
    first, second = _ends(two, name, kind)
    runs.assert_close(first | second, runs.ended_with_experts(trainer))
    for key in first.keys() & second.keys():  # not close but equal: nothing may drift apart
        assert torch.equal(first[key], second[key]), key
    assert any(key.startswith("gate.") for key in first) and "em.resp" in first


@pytest.mark.parametrize("name", NAMES)
def test_the_log_is_that_of_one_process(two: Path, one: dict[str, Any], runs: ModuleType, name: str) -> None:
    """Losses, usage and accuracies are counted once, and the norm of the gradient is that of all experts."""
    trainer, metrics, _ = one[name]
    for kind in ("whole", "resumed"):
        reports = _reports(two, name, kind)
        assert reports[0]["history"] == reports[1]["history"] and reports[0]["metrics"] == reports[1]["metrics"]
        for found, expected in zip(reports[0]["history"], runs.history(trainer), strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=2e-5)
        assert reports[0]["metrics"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    norms = [line["grad_norm"] for line in runs.history(trainer) if "grad_norm" in line]
    assert max(norms) > 0.4  # where gradients are clipped, they are clipped


@pytest.mark.parametrize("name", NAMES)
def test_each_process_holds_its_own_experts_alone(two: Path, one: dict[str, Any], runs: ModuleType, name: str) -> None:
    trainer = one[name][0]
    sizes = [sum(p.numel() for p in model.parameters()) for model in trainer.mixture.experts.models]
    base = sum(p.numel() for p in trainer.mixture.experts.base_model.parameters())
    for rank, report in enumerate(_reports(two, name, "whole")):
        assert _experts_in(_ends(two, name, "whole")[rank]) == set(OWN[rank])
        own = sum(sizes[k] for k in OWN[rank])
        wide_reference = sizes[1] if name == "parallel" and rank == 1 else 0  # all others are measured against the base
        assert report["numbers"]["trained"] == own
        assert report["numbers"]["models"] == own + base + wide_reference
        training = sum(sizes[k] for k in OWN[rank] if k not in runs.SCENARIOS[name].get("freeze_experts", []))
        gate = sum(p.numel() for p in trainer.mixture.gate.parameters() if p.requires_grad)
        assert report["numbers"]["moments"] == 2 * (training + gate)


def test_a_policy_is_one_folder_with_all_experts(two: Path, one: dict[str, Any], runs: ModuleType) -> None:
    trainer = one["parallel"][0]
    run_dir = two / "parallel-whole"
    loaded = trainer.policy.from_pretrained(run_dir / "policy", device="cpu")
    for k, model in enumerate(trainer.mixture.experts.models):
        runs.assert_close(dict(loaded.model.experts.models[k].named_parameters()), dict(model.named_parameters()))
    torch.testing.assert_close(loaded.weights(user="u1"), trainer.policy.weights(user="u1"), rtol=1e-4, atol=1e-5)
    references = [entry and entry["sha256"] for entry in loaded.config.experts["references"]]
    assert references == [entry and entry["sha256"] for entry in trainer.policy.config.experts["references"]]
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".")]  # nothing half-written


def test_one_process_goes_on_where_two_stopped(two: Path, one: dict[str, Any], runs: ModuleType) -> None:
    """Beside the runs of two, because a checkpoint knows where its experts started."""
    for name in NAMES:
        fields = runs.SCENARIOS[name]
        checkpoint = f"checkpoint-{fields['save_steps']}"
        shutil.copytree(two / f"{name}-whole" / checkpoint, two / f"{name}-alone" / checkpoint)
        trainer = runs.make_trainer(two / f"{name}-alone", 1, **fields, expert_parallel=True)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 6
        runs.assert_close(runs.ended_with_experts(trainer), runs.ended_with_experts(one[name][0]))


def test_random_draws_agree_among_processes(two: Path) -> None:
    """Sampled experts and dropped tokens are the same everywhere, though one model drops attention too."""
    (first, second), reports = _ends(two, "parallel draws", "whole"), _reports(two, "parallel draws", "whole")
    shared = first.keys() & second.keys()
    assert {"em.resp", "em.table"} <= shared and all(torch.equal(first[key], second[key]) for key in shared)
    assert reports[0]["history"] == reports[1]["history"]
    again, and_again = _ends(two, "parallel draws", "resumed")
    for found, expected in ((again, first), (and_again, second)):
        assert all(torch.equal(found[key], expected[key]) for key in expected)  # draws are part of a checkpoint


def test_a_checkpoint_is_not_taken_for_another_kind(two: Path, runs: ModuleType) -> None:
    fields = runs.SCENARIOS["parallel"]
    shutil.copytree(two / "parallel-whole" / "checkpoint-2", two / "plain" / "checkpoint-2")
    with pytest.raises(ValueError, match="expert_parallel was True, now None"):
        runs.make_trainer(two / "plain", 1, **fields).train(resume_from_checkpoint=True)
