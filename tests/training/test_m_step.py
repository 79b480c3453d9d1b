"""Cheap M-steps in the trainer: the mean over every draw is the whole gradient, and the loss is the same bound."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.training.conftest import parted
from torch import Tensor

from prefmix.training.objective import learners_of_texts
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
KINDS: dict[str, dict[str, Any]] = {
    "hidden": {"head": "hidden"},
    "logit": {"head": "logit"},
    "full": {"head": "full"},
    "branches": {"branch_depth": 1, "cache_states": "off"},
    "trained trunk": {"branch_depth": 1, "trunk": "lora", "cache_states": "off"},
    "all blocks": {"branch_depth": -1, "cache_states": "off"},
    "branches and heads": {"branch_depth": 1, "head": "hidden", "cache_states": "off"},
}


def step(trainer: MixtureTrainer, rows: range) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one batch."""
    batch = trainer.data_collator(rows)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["weight"].sum())
    loss.backward()
    trained = [p for p in trainer.mixture.parameters() if p.requires_grad]
    return loss.detach(), torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_every_draw_is_the_whole_gradient(make_trainer: Make, kind: str) -> None:
    fields = {"latent": "pair", "init": "random", "gate_update": "gradient", "init_hold_epochs": 0, **KINDS[kind]}
    trainer = parted(make_trainer(m_step="sampled", **fields))
    rows = range(3)
    responsibilities: list[Tensor] = []

    def outcome(resp: Tensor, drawn: tuple[int, ...] | None) -> Tensor:
        responsibilities.append(resp)
        return resp if drawn is None else torch.nn.functional.one_hot(torch.tensor(drawn), 2).to(resp.dtype)

    trainer._m_step = lambda resp, **_: outcome(resp, None)
    exact_loss, exact = step(trainer, rows)
    (resp,) = responsibilities
    assert exact.abs().max() > 1e-3 and float(resp.min()) > 0.02
    mean = torch.zeros_like(exact)
    for drawn in itertools.product(range(2), repeat=len(rows)):
        trainer._m_step = lambda resp, *, drawn=drawn, **_: outcome(resp, drawn)
        loss, gradient = step(trainer, rows)
        torch.testing.assert_close(loss, exact_loss)  # what is logged is the bound, whoever learns
        mean += gradient * resp[range(len(rows)), list(drawn)].prod()
    torch.testing.assert_close(mean, exact, rtol=1e-3, atol=2e-5 * float(exact.abs().max()))
    whole = parted(make_trainer(m_step="all", **fields))
    torch.testing.assert_close(step(whole, rows)[1], exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("m_step", ["sampled", "top"])
@pytest.mark.parametrize("kind", ["hidden", "branches"])
def test_one_expert_learns_as_in_plain_dpo(make_trainer: Make, m_step: str, kind: str) -> None:
    plain, cheap = (parted(make_trainer(num_experts=1, m_step=m, **KINDS[kind])) for m in ("all", m_step))
    for found, expected in zip(step(cheap, range(8)), step(plain, range(8)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_experts_that_nobody_draws_get_no_gradient(make_trainer: Make) -> None:
    trainer = parted(make_trainer(num_experts=3, m_step="top", m_step_threshold=1.0, init="labels", latent="user"))
    trainer.hold_steps = 1  # two true groups: the third expert never is the largest
    step(trainer, range(8))
    for parameter in trainer.mixture.experts.parameters():
        if parameter.grad is not None:
            assert parameter.grad[:2].abs().amax() > 0 and (parameter.grad[2] == 0).all()


@pytest.mark.parametrize("m_step", ["sampled", "top"])
def test_cheap_m_steps_train_and_resume(make_trainer: Make, rows: Any, tmp_path: Any, m_step: str) -> None:
    fields = {"m_step": m_step, "save_strategy": "steps", "save_steps": 4, "num_train_epochs": 1}
    whole = make_trainer(tmp_path / "run", **fields)
    whole.train()
    (tmp_path / "run" / "finished.json").unlink()
    again = make_trainer(tmp_path / "run", **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for found, expected in zip(again.mixture.experts.parameters(), whole.mixture.experts.parameters()):
        assert torch.equal(found, expected)


def test_learners_are_those_of_the_rows_that_have_the_text() -> None:
    coefficient = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
    batch = {"chosen": torch.tensor([0, 1, 2]), "rejected": torch.tensor([1, 3, 0]), "text_ids": torch.arange(4)}
    expected = [[True, False], [True, True], [False, False], [False, True]]
    assert learners_of_texts(coefficient, batch).tolist() == expected
    ranked = {"ranked": torch.tensor([0, 2, 1, 1, 3, 2, 0]), "ranked_size": torch.tensor([3, 2, 2])}
    assert learners_of_texts(coefficient, batch | ranked).tolist() == [
        [True, False], [True, True], [True, False], [False, True],
    ]  # fmt: skip
