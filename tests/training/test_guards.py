"""NaN or infinity stops the run within one step, names step, expert and rows, and nothing of it is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from prefmix.training.guards import NonFiniteError
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
POISON_AFTER = 8  # steps; the checkpoint of step 6 is the last one that may exist


class Poison(TrainerCallback):
    """Puts a bad value somewhere before step 9."""

    def __init__(self, where: Callable[[MixtureTrainer], None]) -> None:
        self.where, self.trainer = where, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == POISON_AFTER:
            self.where(self.trainer)


def trained_parameter(trainer: MixtureTrainer) -> torch.nn.Parameter:
    return next(p for p in trainer.mixture.experts.parameters() if p.requires_grad)


@torch.no_grad()
def weights_of_expert_one(trainer: MixtureTrainer) -> None:
    trained_parameter(trainer)[1].view(-1)[0] = torch.nan


@torch.no_grad()
def gate(trainer: MixtureTrainer) -> None:
    trainer.mixture.gate.global_log_weights[0] = torch.inf


def gradient_of_expert_zero(trainer: MixtureTrainer) -> None:
    def bad(gradient: torch.Tensor) -> torch.Tensor:
        poisoned = gradient.clone()
        poisoned[0, 0, 0] = torch.inf
        return poisoned

    trained_parameter(trainer).register_hook(bad)


def infinite_step(trainer: MixtureTrainer) -> None:
    for group in trainer.optimizer.param_groups:
        group["lr"] = torch.inf


def loss(trainer: MixtureTrainer) -> None:
    original = trainer.compute_loss

    def bad(model: Any, inputs: dict[str, torch.Tensor], **rest: Any) -> torch.Tensor:
        return original(model, inputs | {"weight": inputs["weight"] * torch.nan}, **rest)

    trainer.compute_loss = bad  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("where", "named"),
    [
        (weights_of_expert_one, ["loss of expert 1", "weights of expert 1"]),
        (gate, ["gate on rows"]),
        (gradient_of_expert_zero, ["gradient of expert 0"]),
        (infinite_step, ["weights of expert 0", "weights of expert 1"]),
        (loss, ["loss on rows"]),
    ],
    ids=["weights", "gate", "gradient", "step", "loss"],
)
def test_a_bad_value_stops_the_run_within_one_step(
    make_trainer: Make, where: Callable[[MixtureTrainer], None], named: list[str]
) -> None:
    poison = Poison(where)
    fields = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None, "callbacks": [poison]}
    trainer = make_trainer(init_hold_epochs=0, **fields)
    poison.trainer = trainer
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith(f"step {POISON_AFTER + 1}: ")
    for part in named:
        assert part in message, message
    rows = trainer.data_collator(list(range(48)))["row"]
    assert any(f"{row}" in message.split("rows [")[1].split("]")[0] for row in rows.tolist())
    run_dir = Path(trainer.args.output_dir)
    assert {path.name for path in run_dir.iterdir()} == {"checkpoint-3", "checkpoint-6", "metrics.jsonl"}
    assert "nan" not in (run_dir / "metrics.jsonl").read_text().lower()


def test_rows_are_those_of_the_input(make_trainer: Make, rows: list[dict[str, Any]]) -> None:
    """Rows that were dropped leave gaps: the message speaks of the input, not of the table."""
    tie = rows[0] | {"tie": True}
    trainer = make_trainer(data=[tie, *rows])
    trainer.start_em()
    batch = trainer.data_collator([0, 1, 2])
    weights_of_expert_one(trainer)
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["weight"].sum())
    with pytest.raises(NonFiniteError, match=r"step 1: .*loss of expert 1 on rows \[1, 2, 3\] of the input"):
        trainer.guard.check(1, trainer.mixture)


def test_a_weight_of_zero_is_sound(make_trainer: Make) -> None:
    """Three experts and two true groups: the third expert's weight is exactly 0, its logarithm -inf."""
    trainer = make_trainer(num_experts=3, init="labels", init_hold_epochs=9)
    trainer.train()
    assert trainer.mixture.gate.population_log_weights()[2] == -torch.inf
