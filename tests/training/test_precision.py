"""Every kind of expert in float32, 16 bits and with recomputed activations: starts at log 2, trains, and is saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.options import validate_options
from prefmix.training.trainer import MixtureTrainer

KINDS: dict[str, dict[str, Any]] = {
    "heads, cached states": {"cache_states": "memory"},
    "heads": {"cache_states": "off"},
    "full head": {"head": "full", "cache_states": "off"},
    "last block": {"branch_depth": 1, "cache_states": "auto"},
    "last block and head": {"branch_depth": 1, "head": "hidden", "cache_states": "auto"},
    "all blocks": {"branch_depth": -1, "cache_states": "auto"},
    "trained trunk, heads": {"trunk": "lora", "cache_states": "auto"},
    "trained trunk, last block": {"trunk": "lora", "branch_depth": 1, "cache_states": "auto"},
    "whole models": {"expert_kind": "independent", "cache_states": "auto", "learning_rate": 1e-3},
}
FROZEN = ["heads, cached states", "heads", "full head"]
RECOMPUTE = [name for name, fields in KINDS.items() if fields.get("branch_depth") or "expert_kind" in fields]


def run(make_trainer: Callable[..., MixtureTrainer], **fields: Any) -> MixtureTrainer:
    """One expert, so that the bound is the loss of DPO alone."""
    defaults = {"num_experts": 1, "latent": "pair", "init": "random", "max_steps": 3, "logging_steps": 1}
    trainer = make_trainer(**(defaults | {"save_strategy": "no"} | fields))
    trainer.train()
    return trainer


def losses(trainer: MixtureTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        (kind, precision)
        for kind in KINDS
        for precision in ("float32", "bf16", "fp16")
        if kind in FROZEN or precision != "fp16"
    ],
)
def test_starts_at_log_two_and_trains(make_trainer, tmp_path: Path, kind: str, precision: str):
    fields = KINDS[kind]
    trainer = run(make_trainer, **fields, **({} if precision == "float32" else {precision: True}))
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(map(math.isfinite, found)) and abs(found[-1] - math.log(2)) > 1e-5
    trained = [p for p in trainer.mixture.experts.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    if "expert_kind" not in fields:
        half = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        assert trainer.mixture.experts.base_model.dtype == half
        policy = MixturePolicy.from_pretrained(tmp_path / "run", device="cpu")
        assert policy.model.experts.base_model.dtype == half


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recomputed_activations_change_nothing(make_trainer, tmp_path: Path, kind: str):
    plain = run(make_trainer, output_dir=tmp_path / "plain", **KINDS[kind])
    again = run(make_trainer, output_dir=tmp_path / "again", gradient_checkpointing=True, **KINDS[kind])
    assert losses(again)[0] == pytest.approx(math.log(2), abs=1e-6)
    pairs = zip(plain.mixture.named_parameters(), again.mixture.named_parameters(), strict=True)
    for (name, expected), (_, found) in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recomputed_activations_in_bfloat16(make_trainer, kind: str):
    trainer = run(make_trainer, gradient_checkpointing=True, bf16=True, **KINDS[kind])
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(map(math.isfinite, losses(trainer)))


@pytest.mark.parametrize("fields", [{"branch_depth": 1}, {"trunk": "lora"}, {"expert_kind": "independent"}])
def test_float16_is_for_frozen_trunks(fields):
    with pytest.raises(ValueError, match="fp16=true .*loss scaling.*bf16=true"):
        validate_options({"fp16": True, **fields})


def test_two_types_at_once_are_refused():
    with pytest.raises(ValueError, match="bf16=true with fp16=true"):
        validate_options({"fp16": True, "bf16": True})
