"""The supervised term: its value and gradient by hand, TRL's for one expert, and what it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tests.training.conftest import parted
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from prefmix.training.config import MixtureConfig
from prefmix.training.options import validate_options
from prefmix.training.penalties import sft_rows
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
ROWS = range(6)
KINDS: dict[str, dict[str, Any]] = {
    "heads": {"latent": "user"},
    "branches": {"branch_depth": 1, "cache_states": "off", "latent": "user"},
    "pair": {"latent": "pair"},
    "membership": {"latent": "membership"},
    "per token": {"latent": "user", "loss_type": "sigmoid_norm"},
}


def step(trainer: MixtureTrainer, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a batch at held responsibilities."""
    trainer.hold_steps = 1
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=batch["weight"].sum())
    loss.backward()
    return loss.detach(), gradient_of(trainer)


def gradient_of(trainer: MixtureTrainer) -> Tensor:
    trained = [p for p in trainer.mixture.experts.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])


def by_hand(trainer: MixtureTrainer, batch: dict[str, Tensor]) -> Tensor:
    """Mean over rows of - sum_k q_ik log pi_k(y_w) / |y_w|, at the first responsibilities."""
    log_probs = trainer.model(**batch).log_probs
    if "segments" in batch:
        lengths = torch.bincount(batch["segments"], minlength=len(log_probs))
    else:
        lengths = batch["completion_mask"].sum(1)
    mean = (log_probs / lengths.unsqueeze(1))[batch["chosen"]]
    resp = trainer.em.initial[batch["group"]]
    return -(batch["weight"].unsqueeze(1) * resp * mean).sum() / batch["weight"].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_term(make_trainer: Make, kind: str) -> None:
    fields = {"init": "random", "num_experts": 3} | KINDS[kind]
    plain, held_up = (parted(make_trainer(sft_weight=weight, **fields)) for weight in (0.0, 2.0))
    batch = plain.data_collator(ROWS)
    torch.manual_seed(0)
    plain_loss, plain_gradient = step(plain, batch)
    torch.manual_seed(0)
    loss, gradient = step(held_up, batch)
    held_up.model.zero_grad()
    term = by_hand(held_up, batch)
    term.backward()
    expected = gradient_of(held_up)
    torch.testing.assert_close(loss - plain_loss, 2 * term.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradient - plain_gradient, 2 * expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )


def test_one_expert_has_trls_sft(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, make_rows: Any
) -> None:
    """A batch of one row, for TRL averages over all tokens of a batch."""
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in make_rows()[:1]]
    ours = MixtureTrainer(
        make_tiny_model(tie_word_embeddings=False),
        MixtureConfig(
            str(tmp_path / "ours"), num_experts=1, head="full", latent="pair", init="random", beta=0.3, sft_weight=0.7,
            cache_states="memory", use_cpu=True,
        ),
        train_dataset=rows,
        processing_class=tiny_tokenizer,
    )  # fmt: skip
    _, gradient = step(ours, ours.data_collator([0]))
    model = make_tiny_model(tie_word_embeddings=False).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    args = DPOConfig(
        str(tmp_path / "theirs"), beta=0.3, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7], bf16=False,
        gradient_checkpointing=False, per_device_train_batch_size=1, report_to="none", use_cpu=True,
    )  # fmt: skip
    theirs = DPOTrainer(
        model=model, ref_model=make_tiny_model(tie_word_embeddings=False), args=args,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer,
    )  # fmt: skip
    theirs.compute_loss(theirs.model, theirs._prepare_inputs(next(iter(theirs.get_train_dataloader())))).backward()
    expected = theirs.model.lm_head.weight.grad.flatten()
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_soft_labels_ties_and_dropped_tokens_count_as_they_should(make_trainer: Make) -> None:
    trainer = parted(make_trainer(sft_weight=1.0, latent="user", init="random"))
    batch = trainer.data_collator(ROWS)
    lengths = torch.bincount(batch["segments"], minlength=len(batch["text_ids"])).unsqueeze(1)
    output = trainer.model(**batch)
    resp = trainer.em.initial[batch["group"]]
    mean = (
        resp.unsqueeze(0) * torch.stack([(output.log_probs / lengths)[batch[side]] for side in ("chosen", "rejected")])
    ).sum(-1)
    label = torch.linspace(0, 1, len(mean[0]))
    found = sft_rows(output, {**batch, "label": label}, resp)
    torch.testing.assert_close(found, -batch["weight"] * (label * mean[0] + (1 - label) * mean[1]))
    tie = torch.ones(len(mean[0]), dtype=torch.bool)
    torch.testing.assert_close(sft_rows(output, {**batch, "tie": tie}, resp), -batch["weight"] * mean.mean(0))
    twice = output._replace(log_probs=2 * output.log_probs)  # as `undo_scale` gives for half of the tokens
    torch.testing.assert_close(sft_rows(twice, batch, resp, 0.5), sft_rows(output, batch, resp))


def test_what_is_preferred_stays_likely(make_trainer: Make, tmp_path: Path) -> None:
    rewards = []
    for weight in (0.0, 1.0):
        trainer = make_trainer(
            tmp_path / str(weight), sft_weight=weight, latent="user", init="labels", num_train_epochs=4,
            init_hold_epochs=4,
            learning_rate=5e-3,
        )  # fmt: skip
        trainer.train()
        logged = [line for line in trainer.state.log_history if "rewards/chosen" in line][-1]
        rewards.append((logged["rewards/chosen"], logged["rewards/accuracies"]))
    (plain, _), (held_up, accuracy) = rewards
    assert held_up > plain and held_up > 0
    assert accuracy > 0.8


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"sft_weight": -1.0}, "sft_weight=-1.0: zero or more"),
        (
            {"sft_weight": 1.0, "m_step": "sampled"},
            "sft_weight with m_step='sampled': it needs every expert's gradient",
        ),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        validate_options(fields)
