"""`MixtureConfig`: TRL's names and defaults where they exist, round trip through JSON, precision."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from prefmix.training.config import MixtureConfig
from prefmix.training.options import RunOptions


def test_round_trip_through_json(tmp_path: Path) -> None:
    args = MixtureConfig(str(tmp_path), num_experts=3, beta=[0.1, 0.2, 0.3], gate=["global"], use_cpu=True, seed=7)
    again = MixtureConfig(**json.loads(args.to_json_string()))
    assert again.to_dict() == args.to_dict()
    assert again.betas == [0.1, 0.2, 0.3] and again.seed == 7


def test_every_changed_default_has_a_reason_and_the_rest_are_the_libraries() -> None:
    from transformers import TrainingArguments
    from trl import DPOConfig

    ours = {item.name: item for item in dataclasses.fields(MixtureConfig)}
    base = {item.name: item for item in dataclasses.fields(TrainingArguments)}
    changed = {item.name for item in dataclasses.fields(RunOptions)}
    for name, item in base.items():
        if name not in changed:
            assert ours[name].default == item.default, name
    for name in changed:
        assert len(ours[name].metadata["help"].split()) >= 6, name
    trl = {item.name: item for item in dataclasses.fields(DPOConfig)}
    for name in ("beta", "max_length", "truncation_mode", "logging_steps", "trust_remote_code"):
        assert ours[name].default == trl[name].default, name


def test_bfloat16_is_for_gpus_unless_asked(tmp_path: Path) -> None:
    assert MixtureConfig(str(tmp_path), use_cpu=True).trunk_dtype == torch.float32
    asked = MixtureConfig(str(tmp_path), use_cpu=True, bf16=True)
    assert asked.trunk_dtype == torch.bfloat16
    assert asked.mixed_precision == "no"  # the experts stay float32, so autocast stays off


def test_a_bad_configuration_fails_when_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="beta=-1"):
        MixtureConfig(str(tmp_path), beta=-1)
    with pytest.raises(ValueError, match="latent='pair'"):
        MixtureConfig(str(tmp_path), gate=["prompt"], latent="user")
