"""K = 1 with a whole model is TRL's `DPOTrainer` in full fine-tuning: loss and every gradient, tied head or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from trl import DPOConfig, DPOTrainer

from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "beta": 0.3,
    "seed": 3,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_of_one_batch_equal_trls(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, make_rows: Any, tied: bool
) -> None:
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows(4, 8)]
    fields = {"num_experts": 1, "expert_kind": "independent", "init": "random", "latent": "pair", "cache_states": "off"}
    ours = MixtureTrainer(
        make_tiny_model(tie_word_embeddings=tied),
        MixtureConfig(str(tmp_path / "ours"), **fields, **SHARED),
        train_dataset=rows,
        processing_class=tiny_tokenizer,
    )
    theirs = DPOTrainer(
        model=make_tiny_model(tie_word_embeddings=tied),
        ref_model=make_tiny_model(tie_word_embeddings=tied),
        args=DPOConfig(str(tmp_path / "theirs"), bf16=False, train_sampling_strategy="sequential", **SHARED),
        train_dataset=datasets.Dataset.from_list([rows[i] for i in ours._get_train_sampler()]),
        processing_class=tiny_tokenizer,
    )
    with torch.no_grad():  # away from the start, where every gradient has the same simple weight
        for a, b in zip(ours.mixture.experts.models[0].parameters(), theirs.model.parameters(), strict=True):
            noise = 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(a.numel()))
            a.add_(noise)
            b.add_(noise)
    our_batch = next(iter(ours.get_train_dataloader()))
    ours.model.train()
    our_loss = ours.compute_loss(ours.model, our_batch, num_items_in_batch=our_batch["weight"].sum())
    our_loss.backward()
    their_batch = theirs._prepare_inputs(next(iter(theirs.get_train_dataloader())))
    theirs.model.train()
    their_loss = theirs.compute_loss(theirs.model, their_batch)
    their_loss.backward()
    assert abs(our_loss - their_loss) < 1e-5 * abs(their_loss)
    assert abs(our_loss - 0.6931) > 1e-2
    found = dict(ours.mixture.experts.models[0].named_parameters())
    for name, parameter in theirs.model.named_parameters():
        assert (found[name].grad - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name
