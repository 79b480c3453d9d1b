"""Continuous groups whose rewards are summed: bound and gradient, users, policy, writing, resume, refusals."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.conftest import Interrupt, ready

from prefmix.cli.main import main
from prefmix.evaluation.evaluator import evaluate
from prefmix.mixture.membership import GaussianQ, kl_to_prior, sample_z, standard_draws
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training import membership_step
from prefmix.training.options import validate_options
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
Rows = list[dict[str, Any]]
ESTEPS = pytest.mark.parametrize("estep", ["per_user", "encoder"])
LOG_LINEAR = {"latent": "membership", "combine": "log_linear", "init": "random"}


def _bound(trainer: MixtureTrainer, samples: int) -> torch.Tensor:
    """The bound of all rows at the users' q, written out: one margin a row and draw, in float64 where it can be."""
    table, network, q = trainer.train_comparisons.table, trainer.mixture.gate.membership, trainer.em.q
    batch = trainer.data_collator(range(len(table)))
    output = trainer.model(**batch)
    ratio = trainer.args.betas[0] * (output.log_probs - output.ref_log_probs).double()
    margins = ratio[batch["chosen"]] - ratio[batch["rejected"]]
    noise = standard_draws(samples, network.dim, seed=0).float().unsqueeze(1)
    z = sample_z(GaussianQ(*q), noise)[:, batch["group"]]
    weights = torch.softmax(output.log_weights + z @ network.loading.T, dim=-1).double()
    summed = torch.einsum("sbk,bk->sb", weights, margins)
    e = trainer.args.label_noise
    log_lik = torch.log((1 - e) * torch.sigmoid(summed) + e * torch.sigmoid(-summed)).mean(0)
    return (log_lik * batch["weight"]).sum() - kl_to_prior(q).sum() + trainer.mixture.gate.log_prior()


@ESTEPS
@pytest.mark.parametrize("label_noise", [0.0, 0.1])
def test_losses_of_an_epoch_sum_to_the_bound(make_trainer: Make, rows: Rows, estep: str, label_noise: float) -> None:
    weighted = [row | {"weight": 0.5 + (i % 3)} for i, row in enumerate(rows)]
    options = {"membership_estep": estep} | ({"kl_annealing": 0.0} if estep == "encoder" else {})
    trainer = ready(make_trainer(data=weighted, label_noise=label_noise, **LOG_LINEAR, **options))
    total = 0.0
    for first in range(0, len(rows), 8):
        batch = trainer.data_collator(range(first, first + 8))
        total -= trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).item()
    assert trainer.em.q.mean.abs().max() > 0.01
    assert total == pytest.approx(_bound(trainer, 16).item(), rel=1e-4)


def test_the_gradient_reaches_experts_gate_and_loading_and_is_the_bounds(make_trainer: Make, rows: Rows) -> None:
    trainer = ready(make_trainer(membership_samples=4, **LOG_LINEAR))
    batch = trainer.data_collator(range(len(rows)))
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).backward()
    trained = [p for p in trainer.mixture.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in trained]
    for by_step, by_hand in zip(found, torch.autograd.grad(-_bound(trainer, 4), trained), strict=True):
        torch.testing.assert_close(by_step, by_hand, rtol=1e-3, atol=1e-5)
        assert by_step.abs().max() > 1e-4
    up = trainer.mixture.experts.head.up.grad
    assert all(up[k].abs().max() > 1e-4 for k in range(trainer.args.num_experts))


def test_an_encoder_gets_the_bounds_gradient(make_trainer: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership_step, "FIRST_LESSONS", 5)
    trainer = ready(make_trainer(membership_estep="encoder", kl_annealing=0.0, **LOG_LINEAR))
    batch = trainer.data_collator(range(len(rows)))
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=1)
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).backward()
    weight = trainer.mixture.gate.membership.encoder.factor[0].weight
    entry = np.unravel_index(int(weight.grad.abs().argmax()), weight.shape)
    gradient, losses = float(weight.grad[entry]), []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            weight[entry] += step
        losses.append(float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=1)))
        with torch.no_grad():
            weight[entry] -= step
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(gradient, rel=0.05)


@ESTEPS
def test_a_run_ends_with_a_policy_that_judges_and_writes_as_a_product(
    make_trainer: Make, make_rows: Callable[..., Rows], tmp_path: Path, estep: str
) -> None:
    epochs = {"num_train_epochs": 3} if estep == "per_user" else {"num_train_epochs": 5, "init_hold_epochs": 3}
    options = LOG_LINEAR | {"init": "probe", "membership_estep": estep, "learning_rate": 2e-2} | epochs
    held_out = make_rows(seed=1)
    trainer = make_trainer(eval_data=held_out, eval_strategy="epoch", **options)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < metrics["eval_population_loss"]
    policy = MixturePolicy.from_pretrained(tmp_path / "run" / "policy", base=trainer.base.model)
    assert policy.decoder == "product" and policy.model.gate.membership.combine == "log_linear"
    scored = policy.score(held_out)
    summed = [float(np.dot(entry["weights"], entry["rewards/margins"])) for entry in scored]
    probability = torch.sigmoid(torch.tensor(summed).double())
    torch.testing.assert_close(torch.tensor([entry["probability"] for entry in scored]).double(), probability)
    report = evaluate(policy, held_out, new_user_context=(0, 2))
    assert report.personalised.log_loss.mean == pytest.approx(-float(probability.log().mean()), rel=1e-5)
    assert report.personalised.log_loss.mean == pytest.approx(metrics["eval_loss"], rel=2e-2)  # q as of the last visit
    assert report.new_users[2].log_loss.mean < report.new_users[0].log_loss.mean
    last = [line for line in trainer.state.log_history if "mixture/elbo" in line][-1]
    # Jensen, and a KL of at least 0: the bound is below the log-likelihood at the mean blend.
    assert last["mixture/elbo"] <= last["mixture/evidence"] < 0
    card = (tmp_path / "run" / "policy" / "README.md").read_text()
    assert "# A product of 2" in card and 'decoder="product"' in card and "sum of margins" in card


def test_such_a_policy_writes_as_a_product_unless_told_otherwise(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = ready(make_trainer(**LOG_LINEAR)).policy
    asked: dict[str, Any] = {"user": "user1", "max_new_tokens": 6, "seed": 3, "temperature": 0.9, "top_p": 0.9}
    product = policy.generate("Tell me.", decoder="product", **asked)
    assert policy.generate("Tell me.", **asked) == product == "".join(policy.generate("Tell me.", stream=True, **asked))
    others = {policy.generate("Tell me.", decoder=decoder, **asked) for decoder in ("sample", "mixture", "top")}
    assert product not in others or len(others) > 1
    written = policy.generate("Tell me.", return_details=True, **asked | {"temperature": 1.0, "top_p": 1.0})
    assert written.expert is None
    torch.testing.assert_close(written.log_rho.exp(), policy.weights(user="user1").expand_as(written.log_rho))
    policy.save_pretrained(tmp_path / "saved")
    words = ["--user", "user1", "--max_new_tokens", "6", "--seed", "3", "--temperature", "0.9", "--top_p", "0.9"]
    capsys.readouterr()
    for further in ([], ["--stream"], ["--decoder", "product"]):
        assert main(["generate", str(tmp_path / "saved"), "--prompt", "Tell me.", *words, *further]) == 0
        assert capsys.readouterr().out == product + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Tell me.\n/decoder product\nTell me.\n"))
    assert main(["chat", str(tmp_path / "saved"), *words]) == 0
    assert capsys.readouterr().out == (product + "\n") * 2


def test_a_new_user_is_adapted_as_training_adapts_its_own(make_trainer: Make, rows: Rows, tmp_path: Path) -> None:
    trainer = ready(make_trainer(label_noise=0.1, **LOG_LINEAR))
    policy = trainer.policy
    mine = [row for row in rows if row["user"] == "user3"]
    adapted = policy.adapt("bob", mine)
    torch.testing.assert_close(adapted, policy.weights(user="user3"), atol=1e-4, rtol=0)
    assert (adapted - policy.gate_weights()).abs().max() > 1e-3
    policy.adapt("bob", mine)
    assert policy.users.log_std[-1].sum() < policy.users.log_std[3].sum()
    policy.save_pretrained(tmp_path / "saved")
    again = MixturePolicy.from_pretrained(tmp_path / "saved", base=trainer.base.model)
    torch.testing.assert_close(again.weights(user="bob"), policy.weights(user="bob"))
    description = json.loads((tmp_path / "saved" / "mixture_config.json").read_text())
    assert description["feedback"] == {"likelihood": "log_linear"}
    with pytest.raises(ValueError, match="log_linear"):
        policy.unknown_user_weights("max_min")


def test_candidates_are_ordered_by_the_summed_reward(make_trainer: Make, rows: Rows) -> None:
    policy = ready(make_trainer(**LOG_LINEAR)).policy
    candidates = sorted({row["chosen"] for row in rows})[:4]
    ranked = policy.rank("user1", rows[0]["prompt"], candidates)
    asked = {"prompt": rows[0]["prompt"], "chosen": candidates[0], "user": "user1"}
    against = [asked | {"rejected": text} for text in candidates[1:]]
    beats = float(np.mean([entry["probability"] for entry in policy.score(against)]))
    assert next(r.score for r in ranked if r.position == 0) == pytest.approx(beats, abs=1e-6)


def test_a_killed_run_resumes_bit_for_bit_and_as_no_mixture(make_trainer: Make, tmp_path: Path) -> None:
    options = LOG_LINEAR | {"save_strategy": "steps", "save_steps": 5, "init_hold_epochs": 0.5}
    whole = make_trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(output_dir=tmp_path / "killed", callbacks=[Interrupt(8)], **options).train()
    with pytest.raises(ValueError, match="feedback"):
        mixture = make_trainer(output_dir=tmp_path / "killed", **options | {"combine": "mixture"})
        mixture.train(resume_from_checkpoint=True)
    again = make_trainer(output_dir=tmp_path / "killed", **options)
    again.train(resume_from_checkpoint=True)
    for first, second in zip(whole.mixture.parameters(), again.mixture.parameters(), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(whole.em.q, again.em.q, strict=True):
        assert torch.equal(first, second) and first.abs().max() > 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"latent": "user"}, "combine with latent='user'"),
        ({"num_experts": 1}, "num_experts"),
        ({"loss_type": "ipo"}, "loss_type='ipo' with combine"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 with combine"),
        ({"label_noise_update": "global"}, "label_noise_update='global' with combine"),
        ({"ties": "davidson"}, "ties='davidson' with combine"),
        ({"likelihood": "bt_lse"}, "likelihood='bt_lse' with combine"),
        ({"m_step": "sampled"}, "m_step='sampled' with combine"),
        ({"beta": [0.1, 0.2, 0.1]}, "give one number"),
    ],
)
def test_what_needs_a_judgement_of_each_expert_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        validate_options({"latent": "membership", "combine": "log_linear", "num_experts": 3} | fields)


def test_soft_labels_are_refused_with_the_remedy(make_trainer: Make, rows: Rows) -> None:
    with pytest.raises(ValueError, match="combine='mixture'"):
        make_trainer(data=[row | {"label": 0.8} for row in rows], **LOG_LINEAR)
