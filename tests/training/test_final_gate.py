"""The gate's last M-step: users' rows at their MAP, metadata under a prior of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefmix.evaluation.evaluator import evaluate
from prefmix.mixture.gates import Gate, GateInputs
from prefmix.training.final_gate import metadata_relevance
from prefmix.training.result import training_log_lik
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
OPTIONS: dict[str, Any] = {"gate": ["global", "user"], "latent": "pair", "learning_rate": 0.05, "beta": 1.0}
METADATA: dict[str, Any] = {"gate": ["global", "metadata"], "latent": "user", "learning_rate": 0.05, "beta": 1.0}


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


@pytest.fixture
def people(make_rows: Any) -> list[dict[str, Any]]:
    """Users whose taste is in one field of two."""
    return [
        row | {"metadata": {"user_taste": row["group"], "user_number": (7 * i) % 5}}
        for i, row in enumerate(make_rows(24, 6))
        for i in [int(row["user"].removeprefix("user"))]
    ]


@pytest.mark.parametrize("latent", ["user", "pair"])
def test_metadata_that_say_nothing_get_no_weight_and_are_named(
    make_trainer: Make, people: list[dict[str, Any]], latent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = METADATA | {"init": "labels", "num_train_epochs": 6, "gate_learning_rate": 0.3}
    if latent == "pair":
        options |= {"latent": "pair"}
    trainer = make_trainer(data=people, **options)
    trainer.train()
    trained, fitted = trainer.mixture.gate, trainer.policy.model.gate
    number, *taste = range(3)  # fields are sorted by name
    assert bool((trained.metadata.weight[:, number] != 0).all())
    assert bool((fitted.metadata.weight[:, number] == 0).all())
    assert bool((fitted.metadata.weight[:, taste] != 0).all())
    assert "get no weight in the gate: user_number" in capsys.readouterr().err
    assert metadata_relevance(trainer, training_log_lik(trainer)).precision.isinf().tolist() == [True, False]


def test_a_flat_prior_leaves_metadata_as_gradient_steps_do(make_trainer: Make, people: list[dict[str, Any]]) -> None:
    trainer = make_trainer(data=people, metadata_prior="flat", **METADATA)
    trainer.train()
    assert trainer.policy.model.gate is trainer.mixture.gate


def test_figures_during_training_are_those_of_the_fitted_metadata(
    make_trainer: Make, people: list[dict[str, Any]]
) -> None:
    held_out = [row | {"user": f"new {row['user']}"} for row in people]
    trainer = make_trainer(data=people, eval_data=held_out, init="labels", **METADATA)
    trainer.train()
    report = evaluate(trainer.policy, held_out)
    assert trainer.evaluate()["eval_population_loss"] == pytest.approx(report.population.log_loss.mean, abs=1e-5)


@pytest.mark.parametrize("other", [{"num_experts": 1}, {"latent": "membership"}, {"robust_over": "user"}])
def test_where_groups_have_no_expert_each_or_rows_count_otherwise_metadata_stay_as_they_trained(
    make_trainer: Make, people: list[dict[str, Any]], other: dict[str, Any]
) -> None:
    trainer = make_trainer(data=people, **(METADATA | other))
    trainer.train()
    assert trainer.policy.model.gate is trainer.mixture.gate
