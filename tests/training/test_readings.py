"""Where the gate alone learns, experts are read once: the same training and evaluation, without a pass of theirs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training import readings
from prefmix.training.setup import Comparisons
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]

KINDS: dict[str, dict[str, Any]] = {
    "logit heads": {"head": "logit"},
    "hidden heads": {"head": "hidden"},
    "hidden heads, no states": {"head": "hidden", "cache_states": "off"},
    "last block": {"branch_depth": 1},
    "whole models": {"expert_kind": "independent", "learning_rate": 1e-3, "reference": "shared"},
}
RUNS: dict[str, dict[str, Any]] = {
    "closed form": {},
    "by gradient": {"latent": "pair", "gate": ["global", "prompt", "metadata"], "m_step": "top"},
    "rows of users": {"latent": "pair", "gate": ["global", "user"], "label_noise_update": "per_annotator"},
    "membership": {"latent": "membership", "membership_samples": 4, "sft_weight": 0.1},
}


def fields_of(kind: str) -> dict[str, Any]:
    fields = KINDS[kind]
    whole = fields.get("expert_kind") == "independent"
    return {"cache_states": "auto" if whole or "branch_depth" in fields else "memory", "beta": 0.3} | fields


@pytest.fixture
def make_gate_run(make_trainer: Make, rows: Any, tmp_path: Path) -> Callable[..., MixtureTrainer]:
    """A run of the gate alone over two experts that were trained apart."""

    def build(name: str, kind: str, **options: Any) -> MixtureTrainer:
        fields = fields_of(kind)
        first = tmp_path / "first"
        if not first.exists():
            make_trainer(first, num_train_epochs=2, init="labels", **({"learning_rate": 5e-2} | fields)).train()
        whole = fields.get("expert_kind") == "independent"
        starts = [str(first / "policy" / f"expert_{k}") for k in range(2)] if whole else [str(first / "policy")]
        start = {"expert_models": starts} if whole else {"init_experts": starts}
        given = {"train_experts": False, "eval_strategy": "epoch", "logging_steps": 1, "seed": 3}
        data = {"data": rows[:40], "eval_data": rows[40:]}
        return make_trainer(tmp_path / name, **data, **(fields | start | given | options))

    return build


def story(trainer: MixtureTrainer) -> list[dict[str, float]]:
    """The log without its clocks and without what the floating-point work of a step was."""
    trainer.train()
    skipped = ("runtime", "per_second", "flos", "memory")
    lines = [{k: v for k, v in line.items() if not any(s in k for s in skipped)} for line in trainer.state.log_history]
    assert any("loss" in line for line in lines) and any("eval_loss" in line for line in lines)
    return lines


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the experts ran")


@pytest.mark.parametrize(
    ("kind", "run"),
    [(kind, "closed form") for kind in KINDS] + [("hidden heads", run) for run in RUNS if run != "closed form"],
)
def test_training_is_the_same_and_runs_no_expert(
    kind: str, run: str, make_gate_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(readings, "reads_experts_once", lambda _: False)
        each_step = make_gate_run("each step", kind, **RUNS[run])
        assert each_step.readings.known is None
        expected = story(each_step)
    once = make_gate_run("once", kind, **RUNS[run])
    assert once.references is None
    once.evaluate()  # held-out texts are read at the first evaluation
    once.state.log_history.clear()
    for name in ("forward", "for_learners", "reference_log_probs"):
        monkeypatch.setattr(once.mixture.experts, name, refuse)
    found = story(once)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-5)
    for ours, theirs in zip(once.mixture.gate.parameters(), each_step.mixture.gate.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)
    weights = [trainer.mixture.gate.population_log_weights() for trainer in (once, each_step)]
    assert torch.allclose(*weights, atol=2e-5)
    policies = [MixturePolicy.from_pretrained(trainer.run_dir, device="cpu") for trainer in (once, each_step)]
    assert torch.allclose(*(policy.users.log_lik for policy in policies), atol=1e-4)


def test_processes_share_the_reading(make_gate_run: Make) -> None:
    """Each reads its part of the texts; the sum over processes is what one process reads."""
    trainer = make_gate_run("second", "hidden heads")
    parts = []
    for index in range(2):
        process = SimpleNamespace(
            process_index=index,
            num_processes=2,
            device=torch.device("cpu"),
            state=SimpleNamespace(deepspeed_plugin=None),
            reduce=lambda found, reduction: found,
        )
        share = readings.Readings(trainer.mixture.experts, trainer.train_comparisons, trainer.args, cast(Any, process))
        assert share.known is not None and trainer.readings.known is not None
        parts.append(share.known)
    assert all((part.log_probs == 0).any() for part in parts)
    for name in ("log_probs", "ref_log_probs"):
        whole = getattr(trainer.readings.known, name)
        assert torch.allclose(sum(getattr(part, name) for part in parts), whole, atol=1e-5)


@pytest.mark.parametrize("options", [{"token_dropout": 0.5}, {"train_experts": True}])
def test_experts_that_change_or_lose_tokens_are_read_in_each_step(
    make_gate_run: Make, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_gate_run("second", "hidden heads", **options)
    assert trainer.readings.known is None
    table = trainer.train_comparisons
    assert trainer.readings.of(table) is not trainer.readings.of(table)
    monkeypatch.setattr(trainer.mixture.experts, "forward", refuse)
    with pytest.raises(AssertionError, match="the experts ran"):
        trainer.train()


def test_rows_of_a_single_evaluation_are_not_kept(make_gate_run: Make, rows: Any) -> None:
    trainer = make_gate_run("second", "hidden heads")
    kept = len(trainer.readings._kept)
    trainer.evaluate(rows[:8])
    gc.collect()
    assert len(trainer.readings._kept) == kept
    assert isinstance(trainer.eval_dataset, Comparisons)
    assert trainer.readings.of(trainer.eval_dataset) is trainer.readings.of(trainer.eval_dataset)
