"""Label noise learnt in training: who answers at random, what honest rows gain, EM's fixed point, resume, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.conftest import Interrupt

from prefmix.evaluation.evaluator import evaluate
from prefmix.experiments.diagnose import diagnose_policy
from prefmix.mixture.annotator_noise import BetaPrior, flip_probability, update_noise
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.options import validate_options
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
Rows = list[dict[str, Any]]
USERS, EACH = 16, 8


def half_at_random(rows: Rows, seed: int = 0) -> Rows:
    """Everybody likes the same; users 1, 3, 5 ... of `opposed_rows` flip a coin instead."""
    rng, found = np.random.default_rng(seed), []
    for row in rows:
        turned = {"chosen": row["rejected"], "rejected": row["chosen"]}  # what the first group would have said
        found.append(row | turned if row["group"] == "b" and rng.random() < 0.5 else row)
    return found


@pytest.fixture
def noisy(make_rows: Callable[..., Rows]) -> Rows:
    return half_at_random(make_rows(USERS, EACH))


@pytest.fixture
def honest(make_rows: Callable[..., Rows]) -> Rows:
    return [row for row in make_rows(USERS, EACH, seed=7) if row["group"] == "a"]


FIELDS: dict[str, Any] = {
    "num_experts": 1, "latent": "user", "learning_rate": 0.1, "beta": 0.5, "num_train_epochs": 12, "seed": 1,
    "per_device_train_batch_size": 32, "save_strategy": "no",
}  # fmt: skip


def test_random_annotators_are_found_and_honest_rows_gain(
    make_trainer: Make, noisy: Rows, honest: Rows, tmp_path: Path
) -> None:
    losses, policies = {}, {}
    for update in ("fixed", "global", "per_annotator"):
        trainer = make_trainer(output_dir=tmp_path / update, data=noisy, label_noise_update=update, **FIELDS)
        trainer.train()
        policies[update] = MixturePolicy.from_pretrained(tmp_path / update / "policy", base=trainer.base.model)
        report = evaluate(policies[update], honest)
        assert report.personalised is not None
        losses[update] = report.personalised.log_loss.mean
        last = [line for line in trainer.state.log_history if "loss" in line][-1]
        assert ("mixture/label_noise" in last) == (update != "fixed")
    users = policies["per_annotator"].users
    rate = {name: float(rate) for name, rate in zip(users.names, users.noise, strict=True)}
    honest_rates, random_rates = ([rate[f"user{u}"] for u in range(first, USERS, 2)] for first in (0, 1))
    auc = np.mean([r > h for r in random_rates for h in honest_rates])
    assert auc > 0.9
    assert losses["per_annotator"] < losses["global"] - 0.1 and losses["per_annotator"] < losses["fixed"] - 0.1
    assert policies["global"].users.noise is None
    assert 0.01 < policies["global"].config.label_noise < 0.4
    findings = {f.check: f for f in diagnose_policy(policies["per_annotator"], noisy).findings}
    assert findings["annotators"].how_much["annotators"] == USERS
    assert findings["annotators"].how_much["mean_rate"] == pytest.approx(np.mean(list(rate.values())))
    assert "annotators" not in {f.check for f in diagnose_policy(policies["fixed"], noisy).findings}


@pytest.mark.parametrize("latent", ["user", "membership"])
def test_a_pass_and_an_m_step_are_the_em_of_the_core(make_trainer: Make, noisy: Rows, latent: str) -> None:
    weighted = [row | {"weight": 0.5 + i % 3} for i, row in enumerate(noisy[:40])]
    weighted += [{**row, "user": None} for row in noisy[40:44]]
    trainer = make_trainer(
        data=weighted, latent=latent, init="random", label_noise_update="per_annotator", label_noise=0.2,
        label_noise_prior=[2.0, 3.0],
    )  # fmt: skip
    with torch.no_grad():
        for parameter in trainer.mixture.experts.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trainer.start_em()
    trainer.refresh_evidence()
    trainer.hold_steps, trainer.state.max_steps = 0, 10
    batch = trainer.data_collator(range(len(weighted)))
    seen: list[Any] = []
    original = trainer.objective.bound
    trainer.objective.bound = lambda *a: seen.append((original(*a), a[3])) or seen[-1][0]  # type: ignore[method-assign]
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=1)
    found, lik = seen[0]
    start = torch.full((len(weighted),), 0.2)
    noisy_p = 0.8 * lik.margins.sigmoid() + 0.2 * (-lik.margins).sigmoid()
    torch.testing.assert_close(lik.log_lik, noisy_p.log())
    flipped = (found.q.resp * flip_probability(lik.margins, start)).sum(1)
    annotator = torch.where(batch["user"] < 0, 5, batch["user"])
    expected = update_noise(flipped, batch["weight"], annotator, 6, BetaPrior(2.0, 3.0))
    trainer.em.noise.m_step()
    torch.testing.assert_close(trainer.em.noise.rate, expected.float())
    assert expected.std() > 1e-3
    torch.testing.assert_close(trainer.running_user_state().noise, expected[:5].double())


def test_what_a_policy_knows_of_a_judge_is_used_and_can_be_forgotten(make_trainer: Make, noisy: Rows) -> None:
    trainer = make_trainer(data=noisy, label_noise_update="per_annotator", init="random", latent="user")
    trainer.start_em()
    with torch.no_grad():
        for parameter in trainer.mixture.experts.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
        trainer.em.noise.rate.copy_(torch.linspace(0.05, 0.45, len(trainer.em.noise.rate)))
    policy, row = trainer.policy, noisy[0]

    def judged(user: str | None) -> tuple[float, float]:
        (score,) = policy.score([row | {"user": user}])
        return score["rewards/margins"][0], score["probabilities"][0]

    mean = float(trainer.em.noise.rate[:USERS].double().mean())
    assert policy.config.label_noise == pytest.approx(mean)
    expected = {"user0": 0.05, "user3": float(trainer.em.noise.rate[3]), None: mean, "stranger": mean}
    for user, rate in expected.items():
        margin, probability = judged(user)
        sure = 1 / (1 + np.exp(-margin))
        assert probability == pytest.approx((1 - rate) * sure + rate * (1 - sure), abs=1e-6)
    policy.forget("user3")
    assert judged("user3")[1] == pytest.approx(judged("stranger")[1])
    assert policy.config.label_noise_prior == tuple(trainer.args.label_noise_prior)
    policy.adapt("stranger", [row])
    assert len(policy.users.noise) == USERS and 0 < policy.users.noise[-1] < 0.5


def test_a_new_judge_of_experts_who_blend_gets_a_rate_too(make_trainer: Make, noisy: Rows) -> None:
    """q(z) is fitted with the rate: whoever answers both ways is at random, whoever agrees with all experts is not."""
    trainer = make_trainer(data=noisy, label_noise_update="per_annotator", init="random", latent="membership", beta=2.0)
    trainer.start_em()
    with torch.no_grad():
        for parameter in trainer.mixture.experts.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    policy = trainer.policy
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in noisy[:30]]
    both = [row for pair in pairs for row in (pair, pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]})]
    margins = np.array([score["rewards/margins"] for score in policy.score(both)])
    assert np.abs(margins).mean() > 0.5
    agreed = [row for row, margin in zip(both, margins, strict=True) if (margin > 0).all()]
    policy.adapt("random", both * 3)
    policy.adapt("careful", agreed * 3)
    random, careful = policy.users.rate("random"), policy.users.rate("careful")
    assert random is not None and careful is not None
    assert random > 0.4 and careful < 0.1


def test_a_killed_run_resumes_bit_for_bit(make_trainer: Make, tmp_path: Path) -> None:
    options = {"label_noise_update": "per_annotator", "save_strategy": "steps", "save_steps": 5, "learning_rate": 2e-2}
    whole = make_trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(output_dir=tmp_path / "killed", callbacks=[Interrupt(8)], **options).train()
    again = make_trainer(output_dir=tmp_path / "killed", **options)
    again.train(resume_from_checkpoint=True)
    for first, second in zip(whole.mixture.parameters(), again.mixture.parameters(), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(whole.em.noise.rate, again.em.noise.rate) and torch.equal(
        whole.em.noise.flipped, again.em.noise.flipped
    )
    with pytest.raises(ValueError, match="label_noise_update"):
        make_trainer(output_dir=tmp_path / "killed", **(options | {"label_noise_update": "global"})).train(
            resume_from_checkpoint=True
        )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"label_noise_prior": [0.5, 1.0]}, "label_noise_prior"),
        ({"label_noise_prior": [2.0]}, "label_noise_prior"),
        ({"loss_type": "hinge"}, "loss_type='hinge' with label_noise_update"),
        ({"ties": "davidson"}, "flipped ties are not modelled"),
        ({"likelihood": "bt_lse", "latent": "pair", "gate_update": "gradient"}, "use 'mbt'"),
        ({"label_noise_update": "fixed", "label_noise_prior": [2.0, 2.0]}, "no effect there"),
    ],
)
def test_what_cannot_work_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        validate_options({"label_noise_update": "global"} | fields)
