"""What a run leaves behind: users' rows of the gate at their MAP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmix.evaluation.evaluator import evaluate
from prefmix.mixture.gates import Gate, GateInputs
from prefmix.training.config import MixtureConfig
from prefmix.training.result import training_log_lik
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
OPTIONS: dict[str, Any] = {"gate": ["global", "user"], "latent": "pair", "learning_rate": 0.05, "beta": 1.0}


def objective(gate: Gate, trainer: MixtureTrainer, log_lik: torch.Tensor) -> torch.Tensor:
    """Evidence of the training rows plus the gate's log prior."""
    table = trainer.train_comparisons.table
    log_weights = gate(GateInputs(user=torch.from_numpy(table.user).long()))
    rows = torch.logsumexp(log_weights + log_lik, dim=1)
    return (torch.from_numpy(table.weight) * rows).sum() + gate.log_prior()


def test_users_rows_are_where_training_would_stay_and_the_gate_that_trains_is_left_alone(make_trainer: Make) -> None:
    trainer = make_trainer(**OPTIONS)
    trainer.train()
    trained = trainer.mixture.gate
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    policy = trainer.policy
    log_lik = training_log_lik(trainer)
    fitted = policy.model.gate
    assert objective(fitted, trainer, log_lik) > objective(trained, trainer, log_lik) + 1e-3
    (gradient,) = torch.autograd.grad(objective(fitted, trainer, log_lik), fitted.user)
    assert gradient.abs().max() < 1e-3
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert torch.equal(fitted.population_log_weights(), trained.population_log_weights())
    assert fitted.user.grad is None and fitted.user.requires_grad


def test_somebody_who_brings_a_known_user_s_comparisons_gets_that_user_s_weights(
    make_trainer: Make, rows: list[dict[str, Any]]
) -> None:
    trainer = make_trainer(**OPTIONS)
    trainer.train()
    policy = trainer.policy
    known = policy.weights(user="user3")
    policy.adapt("twin", [row for row in rows if row["user"] == "user3"])
    assert policy.weights(user="twin").tolist() == pytest.approx(known.tolist(), abs=1e-4)
    assert abs(known - policy.weights()).max() > 0.02, "the user's rows say something"


def test_figures_during_training_are_those_of_the_policy(make_trainer: Make, make_rows: Any) -> None:
    held_out = make_rows(8, 3, seed=1)
    trainer = make_trainer(eval_data=held_out, **OPTIONS)
    trainer.train()
    report = evaluate(trainer.policy, held_out)
    metrics = trainer.evaluate()
    assert report.personalised is not None
    assert metrics["eval_loss"] == pytest.approx(report.personalised.log_loss.mean, abs=1e-5)
    assert metrics["eval_population_loss"] == pytest.approx(report.population.log_loss.mean, abs=1e-5)
    assert abs(metrics["eval_loss"] - metrics["eval_population_loss"]) > 0.01


def test_a_gate_without_rows_of_users_is_the_one_that_trained(make_trainer: Make) -> None:
    trainer = make_trainer(max_steps=1)
    assert trainer.policy.model.gate is trainer.mixture.gate


def test_the_policy_keeps_how_its_rows_were_written_and_held_out_rows_of_the_other_form_are_a_warning(
    make_trainer: Make, make_tiny_model: Any, tiny_chat_tokenizer: Any, rows: Any, tmp_path: Path
) -> None:
    def said(text: str, role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chats = [row | {name: said(row[name], role) for name, role in roles.items()} for row in rows]
    args = MixtureConfig(str(tmp_path / "chats"), cache_states="memory", probe_dim=4, use_cpu=True, disable_tqdm=True)
    with pytest.warns(UserWarning, match="the rows are plain text.*training rows were messages"):
        trainer = MixtureTrainer(make_tiny_model(), args, chats, rows, tiny_chat_tokenizer)
    assert trainer.policy.config.row_form == "conversational"
    assert make_trainer().policy.config.row_form == "standard"
