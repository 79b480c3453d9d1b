"""Pooled experts in the trainer: the gradient is that of the written penalty, whatever an expert is; its two ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.conftest import parted
from torch import Tensor

from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.mixture.linear_em import log_prior
from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.options import validate_options
from prefmix.training.penalties import expert_variance, pooling_like, pooling_of, pooling_penalty
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
KINDS: dict[str, dict[str, Any]] = {
    "hidden": {"head": "hidden"},
    "logit": {"head": "logit"},
    "full": {"head": "full"},
    "branches": {"branch_depth": 1, "cache_states": "off"},
    "trained trunk": {"branch_depth": 1, "trunk": "lora", "cache_states": "off"},
    "whole models": {"expert_kind": "independent", "cache_states": "off"},
}
LATENTS: dict[str, dict[str, Any]] = {
    "pair": {"latent": "pair"},
    "membership": {"latent": "membership", "membership_samples": 4},
    "marginal": {"latent": "pair", "likelihood": "bt_lse", "gate_update": "gradient"},
    "per token": {"latent": "user", "loss_type": "sigmoid_norm"},
}
ROWS = range(6)


def step(trainer: MixtureTrainer, rows: range = ROWS) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one batch at held responsibilities."""
    trainer.hold_steps = 1
    batch = trainer.data_collator(rows)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["weight"].sum())
    loss.backward()
    trained = [p for p in trainer.mixture.experts.parameters() if p.requires_grad]
    return loss.detach(), torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])


def spread_of(trainer: MixtureTrainer, rows: range = ROWS) -> Tensor:
    """mean_i a_i sum_k (m_ik - mean m_i)^2 / K by hand, from the trainer's rewards."""
    batch = trainer.data_collator(rows)
    output = trainer.model(**batch)
    lengths = torch.ones(len(output.log_probs))
    if trainer.args.loss_type == "sigmoid_norm":
        lengths = torch.bincount(batch["segments"], minlength=len(lengths)).float()
    rewards = trainer._beta * (output.log_probs - output.ref_log_probs) / lengths.unsqueeze(1)
    margins = rewards[batch["chosen"]] - rewards[batch["rejected"]]
    deviation = margins - margins.mean(1, keepdim=True)
    by_row = batch["weight"] * deviation.square().sum(1) / deviation.shape[1]
    return by_row.sum() / batch["weight"].sum()


@pytest.mark.parametrize("kind", [*KINDS, *LATENTS])
def test_the_gradient_is_that_of_the_penalty(make_trainer: Make, kind: str) -> None:
    """For every kind of expert, latent, and reward."""
    fields = {"init": "random", "num_experts": 3, "beta": [0.1, 0.5, 0.3], "latent": "user"} | (KINDS | LATENTS)[kind]
    plain, pooled = (parted(make_trainer(pooling=pooling, **fields)) for pooling in (0.0, 2.0))
    (plain_loss, plain_gradient), (loss, gradient) = step(plain), step(pooled)
    pooled.model.zero_grad()
    spread = spread_of(pooled)
    spread.backward()
    trained = [p for p in pooled.mixture.experts.parameters() if p.requires_grad]
    expected = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
    assert float(spread.detach()) > 1e-6 and float(expected.abs().max()) > 1e-5
    torch.testing.assert_close(loss - plain_loss, 2.0 * spread.detach(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        gradient - plain_gradient, 2.0 * expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )


def test_finite_differences_of_the_loss(make_trainer: Make) -> None:
    trainer = parted(make_trainer(pooling=5.0, latent="user", init="random", beta=1.0))
    _, gradient = step(trainer)
    trained = [p for p in trainer.mixture.experts.parameters() if p.requires_grad]
    direction = gradient / gradient.norm()

    def moved(by: float) -> float:
        with torch.no_grad():
            for parameter, part in zip(trained, direction.split([p.numel() for p in trained])):
                parameter.add_(by * part.view_as(parameter))
        return float(step(trainer)[0])

    size = 2e-2
    up, down = moved(size), moved(-2 * size)
    assert (up - down) / (2 * size) == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_linear_experts_have_the_hierarchical_prior() -> None:
    """In the metric of the data: sum over experts of |deviation|^2 / 2 times (2 pooling / K) sum_i a_i d_i d_i^T."""
    rng, experts, pooling = np.random.default_rng(0), 3, 1.7
    features, c = torch.from_numpy(rng.normal(size=(8, 2))), torch.from_numpy(rng.normal(size=(experts, 2)))
    chosen, rejected = torch.arange(4), torch.arange(4, 8)
    weight = torch.from_numpy(rng.uniform(0.5, 1.5, size=4))
    output = MixtureOutput(features @ c.T, torch.zeros(8, experts, dtype=torch.float64), torch.zeros(4, experts))
    batch = {"chosen": chosen, "rejected": rejected, "weight": weight, "text_ids": torch.arange(8)}
    beta = torch.ones(experts, dtype=torch.float64)
    found = pooling * pooling_penalty(output, batch, beta=beta, model=FeedbackModel()).sum()
    difference = features[chosen] - features[rejected]
    metric = 2 * pooling / experts * (difference.T * weight) @ difference
    whitened = c @ torch.linalg.cholesky(metric)
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(found, -log_prior(torch.zeros(1, experts), whitened[None], none, 1.0, one)[0])


def test_a_prior_of_linear_rewards_and_its_pooling_are_one_prior_where_differences_are_isotropic() -> None:
    """With sum_i a_i d_i d_i^T a multiple of the identity, they are equal exactly, not in trace alone."""
    rng, experts, precision = np.random.default_rng(1), 3, 16.0
    basis, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    difference, weight = torch.from_numpy(np.concatenate([3 * basis, 5 * basis])), torch.tensor([0.5] * 4 + [2.0] * 4)
    c = torch.from_numpy(rng.normal(size=(experts, 4)))
    pooling = pooling_like(precision, difference, weight, experts)
    deviation = c - c.mean(0)
    spread = (weight * expert_variance(difference @ c.T)).sum()
    torch.testing.assert_close(pooling * spread, precision / 2 * deviation.square().sum())
    twice = pooling_like(precision, torch.cat([difference, difference]), torch.cat([weight, weight]), experts)
    assert twice == pytest.approx(pooling / 2)  # the whole prior keeps its strength
    assert pooling_like(precision, 0 * difference, weight, experts) == 0.0


def test_left_to_itself_the_strength_is_the_probes(make_trainer: Make, tmp_path: Path) -> None:
    trainer = parted(make_trainer(latent="user", init="probe", beta=10.0))
    strength = trainer.em.pooling
    assert strength > 0
    own, _ = step(trainer)
    given, _ = step(parted(make_trainer(latent="user", init="probe", pooling=strength, beta=10.0)))
    none, _ = step(parted(make_trainer(latent="user", init="probe", pooling=0.0, beta=10.0)))
    torch.testing.assert_close(own, given)
    assert float(own - none) == pytest.approx(strength * float(spread_of(trainer).detach()), rel=1e-3)
    other = make_trainer(latent="user", init="probe")
    other.em.load_state_dict(trainer.em.state_dict())
    assert other.em.pooling == strength  # a resumed run does not probe again
    assert parted(make_trainer(latent="user", init="random")).em.pooling == 0.0


def test_where_it_is_not_asked_for_it_holds_only_what_can_be_held(make_trainer: Make) -> None:
    assert pooling_of(make_trainer(num_experts=2).args, 0.3) == 0.3
    assert pooling_of(make_trainer(num_experts=2, pooling=0.0).args, 0.3) == 0.0
    assert pooling_of(make_trainer(num_experts=1).args, 0.3) == 0.0
    assert pooling_of(make_trainer(num_experts=2, m_step="top").args, 0.3) == 0.0
    marginal = {"latent": "pair", "likelihood": "bt_lse", "gate_update": "gradient"}
    assert pooling_of(make_trainer(num_experts=2, **marginal).args, 0.3) == 0.0


def test_strong_pooling_keeps_experts_together(make_trainer: Make, tmp_path: Path) -> None:
    apart = []
    for pooling in (0.0, 1.0, 1000.0):
        trainer = make_trainer(
            tmp_path / str(pooling), pooling=pooling, latent="user", init="labels", num_train_epochs=3, beta=1.0,
            learning_rate=5e-3,
        )  # fmt: skip
        trainer.train()
        logged = [line["mixture/expert_variance"] for line in trainer.state.log_history if "loss" in line]
        apart.append(logged[-1])
    assert apart[0] > 2 * apart[1] > 20 * apart[2]


def test_one_expert_pays_nothing(make_trainer: Make) -> None:
    plain, pooled = (parted(make_trainer(num_experts=1, pooling=p, init="random")) for p in (0.0, 9.0))
    for found, expected in zip(step(pooled), step(plain), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"pooling": -1.0}, "pooling=-1.0: zero or more"),
        ({"pooling": float("inf")}, "pooling=inf: zero or more"),
        ({"pooling": 1.0, "m_step": "sampled"}, "pooling with m_step='sampled': it needs every expert's gradient"),
        ({"pooling": 1.0, "m_step": "top"}, "pooling with m_step='top': it needs every expert's gradient"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        validate_options(fields)
