"""Batches of like length: where they are the default, and that a run which stops within an epoch goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from prefmix.training.config import MixtureConfig
from prefmix.training.options import validate_options
from prefmix.training.order import longer_text


@pytest.mark.parametrize(
    ("fields", "strategy"),
    [
        ({}, "random"),  # cached states are not padded
        ({"cache_states": "off"}, "group_by_length"),
        ({"branch_depth": 2}, "group_by_length"),
        ({"trunk": "lora"}, "group_by_length"),
        ({"expert_kind": "independent"}, "group_by_length"),
        ({"branch_depth": 2, "train_sampling_strategy": "random"}, "random"),
    ],
)
def test_it_is_the_default_where_token_ids_are_read(tmp_path, fields, strategy):
    assert MixtureConfig(str(tmp_path), use_cpu=True, **fields).train_sampling_strategy == strategy


def test_other_orders_of_transformers_are_refused():
    with pytest.raises(ValueError, match="train_sampling_strategy='sequential': expected one of random, group_by_leng"):
        validate_options({"train_sampling_strategy": "sequential"})


def test_length_is_that_of_the_longer_text(make_trainer, rows):
    table = make_trainer().train_comparisons.table
    texts = table.texts
    for row, length in enumerate(longer_text(table)[:5]):
        pair = [
            len(texts.prompt_ids[i]) + len(texts.completion_ids[i]) for i in (table.chosen[row], table.rejected[row])
        ]
        assert length == max(pair)


class Killed(Exception):
    """What a run dies of."""


class DieAfterSaving(TrainerCallback):
    """Ends a run as a crash would, right after its first checkpoint."""

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        raise Killed


def test_a_run_that_died_within_an_epoch_goes_on_exactly(make_trainer, tmp_path: Path):
    fields = {"branch_depth": 1, "per_device_train_batch_size": 4, "cache_states": "auto", "save_strategy": "steps"}
    fields |= {"save_steps": 17, "logging_steps": 1, "group_texts": False, "learning_rate": 1e-3}
    whole = make_trainer(tmp_path / "whole", **fields)
    assert whole.args.train_sampling_strategy == "group_by_length"
    whole.train()
    with pytest.raises(Killed):
        make_trainer(tmp_path / "parts", callbacks=[DieAfterSaving()], **fields).train()
    rest = make_trainer(tmp_path / "parts", **fields)
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == whole.state.global_step == 24
    for name, expected in whole.mixture.state_dict().items():
        assert torch.equal(rest.mixture.state_dict()[name], expected), name


def test_padded_batches_hold_fewer_tokens(make_trainer, tmp_path: Path):
    """Of the batches that the collator makes; the rows of this test are of two kinds of length."""
    rng = np.random.default_rng(0)
    data = [
        {"prompt": "Where is it?", "chosen": f" sky {i}" + " blue" * n, "rejected": f" sea {i}" + " green" * n}
        for i, n in enumerate(rng.integers(1, 30, size=64))
    ]
    padded = {}
    for strategy in ("random", "group_by_length"):
        fields = {"branch_depth": 1, "cache_states": "auto", "train_sampling_strategy": strategy, "init": "random"}
        trainer = make_trainer(tmp_path / strategy, data=data, **fields)
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        padded[strategy] = sum(int((mask == 0).sum()) for mask in masks)
    assert padded["group_by_length"] < 0.7 * padded["random"]
