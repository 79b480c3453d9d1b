"""Continuous groups in the trainer: the bound's gradient, resume, the policy's users, new users, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import Interrupt, ready

from prefmix.evaluation.evaluator import evaluate
from prefmix.mixture.membership import (
    GaussianQ,
    MembershipRows,
    kl_to_prior,
    rows_log_lik,
    sample_z,
    standard_draws,
)
from prefmix.mixture.membership_fit import fit_users
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training import membership_step
from prefmix.training.options import validate_options
from prefmix.training.result import training_log_lik
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
Rows = list[dict[str, Any]]
ESTEPS = pytest.mark.parametrize("estep", ["per_user", "encoder"])


def _rows(trainer: MixtureTrainer) -> MembershipRows:
    table = trainer.train_comparisons.table
    gate = trainer.mixture.gate.population_log_weights().detach().expand(len(table), -1)
    user, weight = torch.from_numpy(table.user).long(), torch.from_numpy(table.weight)
    return MembershipRows(gate, training_log_lik(trainer).float(), user, weight, len(table.users))


@ESTEPS
def test_losses_of_an_epoch_sum_to_the_bound(make_trainer: Make, rows: Rows, estep: str) -> None:
    weighted = [row | {"weight": 0.5 + (i % 3)} for i, row in enumerate(rows)]
    options = {"membership_estep": estep} | ({"kl_annealing": 0.0} if estep == "encoder" else {})
    trainer = ready(make_trainer(data=weighted, latent="membership", init="random", **options))
    network = trainer.mixture.gate.membership
    total = 0.0
    for first in range(0, len(rows), 8):
        batch = trainer.data_collator(range(first, first + 8))
        total -= trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).item()
    every, q = _rows(trainer), trainer.em.q
    noise = standard_draws(16, network.dim, seed=0).float().unsqueeze(1)
    q = GaussianQ(q.mean, q.log_std)
    log_lik = rows_log_lik(every, network.loading, sample_z(q, noise), "mixture").mean(0) * every.weight
    bound = log_lik.sum() - kl_to_prior(q).sum() + trainer.mixture.gate.log_prior()
    assert total == pytest.approx(float(bound), rel=1e-4)


def test_the_gradient_is_the_bounds_at_fixed_q(make_trainer: Make, rows: Rows) -> None:
    """One batch of all rows: experts, gate terms and A get the gradient of the sum that autograd takes by itself."""
    trainer = ready(make_trainer(latent="membership", init="random", membership_samples=4))
    batch = trainer.data_collator(range(len(rows)))
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).backward()
    trained = [p for p in trainer.mixture.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in trained]
    output = trainer.model(**batch)
    lik = trainer._likelihoods(output, batch)
    network, q = trainer.mixture.gate.membership, trainer.em.q
    every = MembershipRows(output.log_weights, lik.log_lik, batch["group"], batch["weight"], len(q.mean))
    noise = standard_draws(4, network.dim, seed=0).float().unsqueeze(1)
    row_log_lik = rows_log_lik(every, network.loading, sample_z(q, noise), "mixture").mean(0)
    bound = (row_log_lik * batch["weight"]).sum() + trainer.mixture.gate.log_prior()
    for by_step, by_hand in zip(found, torch.autograd.grad(-bound, trained), strict=True):
        torch.testing.assert_close(by_step, by_hand, rtol=1e-3, atol=1e-5)
    assert network.loading.grad.abs().max() > 1e-3


@ESTEPS
def test_a_run_ends_with_users_who_differ_and_a_policy_that_knows_them(
    make_trainer: Make, make_rows: Callable[..., Rows], tmp_path: Path, estep: str
) -> None:
    # An encoder tells users apart by what experts say of them, so these must have parted first.
    epochs = {"num_train_epochs": 3} if estep == "per_user" else {"num_train_epochs": 5, "init_hold_epochs": 3}
    options = {"latent": "membership", "membership_estep": estep, "learning_rate": 2e-2} | epochs
    held_out = make_rows(seed=1)
    trainer = make_trainer(eval_data=held_out, eval_strategy="epoch", **options)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < metrics["eval_population_loss"]
    policy = MixturePolicy.from_pretrained(tmp_path / "run" / "policy", base=trainer.base.model)
    first, second = policy.weights(user="user0"), policy.weights(user="user1")
    assert (first - second).abs().max() > 0.05
    torch.testing.assert_close(first.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(first, trainer.policy.weights(user="user0"))
    with pytest.warns(UserWarning, match="unknown"):
        unknown = policy.weights(user="nobody")
    torch.testing.assert_close(unknown, policy.gate_weights())
    assert any("mixture/elbo" in entry for entry in trainer.state.log_history)


def test_a_new_user_is_adapted_as_training_adapts_its_own(make_trainer: Make, rows: Rows, tmp_path: Path) -> None:
    trainer = ready(make_trainer(latent="membership", init="random"))
    policy = trainer.policy
    mine = [row for row in rows if row["user"] == "user3"]
    adapted = policy.adapt("bob", mine)
    torch.testing.assert_close(adapted, policy.weights(user="user3"), atol=1e-4, rtol=0)
    more = policy.adapt("bob", mine)
    assert policy.users.log_std[-1].sum() < policy.users.log_std[3].sum()
    assert more.argmax() == adapted.argmax()
    policy.forget("bob")
    with pytest.warns(UserWarning, match="bob"):
        torch.testing.assert_close(policy.weights(user="bob"), policy.gate_weights())
    policy.adapt("bob", mine)
    policy.save_pretrained(tmp_path / "saved")
    again = MixturePolicy.from_pretrained(tmp_path / "saved", base=trainer.base.model)
    torch.testing.assert_close(again.weights(user="bob"), adapted)


def test_q_of_the_policy_is_the_fit_to_all_training_rows(make_trainer: Make) -> None:
    trainer = ready(make_trainer(latent="membership", init="random"))
    every, network = _rows(trainer), trainer.mixture.gate.membership
    double = MembershipRows(every.gate_log_weights.double(), every.score.double(), *every[2:])
    fit = fit_users(double, network.loading.detach().double(), "mixture", standard_draws(32, network.dim))
    torch.testing.assert_close(trainer.policy.users.mean, fit.q.mean, atol=1e-3, rtol=0)


@ESTEPS
def test_the_evaluator_personalises_known_and_new_users(
    make_trainer: Make, make_rows: Callable[..., Rows], estep: str
) -> None:
    """Experts that have opposed tastes: people are served by their own comparisons, the population is not."""
    fields = {"latent": "membership", "membership_estep": estep, "num_train_epochs": 5, "init_hold_epochs": 3}
    trainer = make_trainer(learning_rate=2e-2, **fields)
    trainer.train()
    rows = make_rows(seed=1)
    report = evaluate(trainer.policy, rows + [row | {"user": f"new {row['user']}"} for row in make_rows(seed=2)])
    assert report.personalised is not None and report.num_known_rows == len(rows)
    assert report.personalised.log_loss < report.population.log_loss
    sizes = sorted(report.new_users)
    assert sizes and report.new_users[sizes[-1]].log_loss < report.population.log_loss


def test_prompts_metadata_and_rows_without_a_user_have_their_say(make_trainer: Make, rows: Rows) -> None:
    anonymous = [{**row, "user": None} if i % 6 == 0 else row for i, row in enumerate(rows)]
    terms = ["global", "prompt", "metadata"]
    trainer = ready(make_trainer(data=anonymous, latent="membership", init="random", gate=terms))
    batch = trainer.data_collator(range(len(rows)))
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).backward()
    assert len(trainer.em.q.mean) == 8 + 8 and bool((trainer.em.q.mean != 0).all())
    gate = membership_step.gate_of_rows(trainer.mixture, trainer.train_comparisons, torch.arange(len(rows)))
    torch.testing.assert_close(gate, trainer.model(**batch).log_weights.detach())
    policy = trainer.policy
    assert len(policy.users.mean) == 8
    first, second = (policy.weights(prompt=text, user="user1") for text in ("What is it?", "Write a review."))
    assert (first - second).abs().max() > 1e-3


@ESTEPS
def test_a_killed_run_resumes_bit_for_bit(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estep: str
) -> None:
    monkeypatch.setattr(membership_step, "FIRST_LESSONS", 20)
    options = {"latent": "membership", "membership_estep": estep, "save_strategy": "steps", "save_steps": 5}
    options |= {"init_hold_epochs": 0.5}
    whole = make_trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(output_dir=tmp_path / "killed", callbacks=[Interrupt(8)], **options).train()
    again = make_trainer(output_dir=tmp_path / "killed", **options)
    again.train(resume_from_checkpoint=True)
    for first, second in zip(whole.mixture.parameters(), again.mixture.parameters(), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(whole.em.q, again.em.q, strict=True):
        assert torch.equal(first, second) and first.abs().max() > 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"gate": ["user"]}, "gate"),
        ({"num_experts": 1}, "num_experts"),
        ({"membership_samples": 3}, "membership_samples"),
        ({"membership_dim": 0}, "membership_dim"),
        ({"free_bits": 0.1}, "free_bits"),
        ({"estep": "hard"}, "estep"),
        ({"gate_update": "fixed"}, "gate_update"),
        ({"latent": "user", "membership_dim": 1}, "membership_dim"),
    ],
)
def test_what_cannot_work_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        validate_options({"latent": "membership", "num_experts": 3} | fields)
