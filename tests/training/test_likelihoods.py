"""Losses in the trainer: K = 1 is TRL's DPOTrainer for each of its names; ties, rankings and soft labels train.

A full head on a frozen trunk against TRL with everything but `lm_head` frozen, on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefmix.evaluation.evaluator import evaluate
from prefmix.training.config import MixtureConfig
from prefmix.training.options import validate_options
from prefmix.training.trainer import MixtureTrainer

SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_steps": 1,
    "beta": 0.3,
    "seed": 3,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
LOSSES = {
    "sigmoid": {},
    "sigmoid_norm": {},
    "hinge": {},
    "ipo": {},
    "robust": {"label_smoothing": 0.1},
}


@pytest.fixture
def pairs(make_rows: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows(4, 2)]


@pytest.mark.parametrize("cache", ["memory", "off"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_expert_has_the_loss_and_gradient_of_trl(
    loss: str, cache: str, make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, pairs: list[dict[str, Any]]
) -> None:
    import datasets
    from trl import DPOConfig, DPOTrainer

    fields = {"num_experts": 1, "head": "full", "init": "random", "latent": "pair", "cache_states": cache}
    args = MixtureConfig(str(tmp_path / "ours"), loss_type=loss, **fields, **LOSSES[loss], **SHARED)
    ours = MixtureTrainer(
        make_tiny_model(tie_word_embeddings=False), args, train_dataset=pairs, processing_class=tiny_tokenizer
    )
    model = make_tiny_model(tie_word_embeddings=False).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    shift = 0.05 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    (head,) = [p for p in ours.mixture.experts.parameters() if p.requires_grad]
    with torch.no_grad():
        head += shift
        model.lm_head.weight += shift
    theirs = DPOTrainer(
        model=model,
        ref_model=make_tiny_model(tie_word_embeddings=False),
        args=DPOConfig(
            str(tmp_path / "theirs"),
            bf16=False,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            loss_type=[loss],
            **LOSSES[loss],
            **SHARED,
        ),
        train_dataset=datasets.Dataset.from_list([pairs[i] for i in ours._get_train_sampler()]),
        processing_class=tiny_tokenizer,
    )
    our_batch = next(iter(ours.get_train_dataloader()))
    our_loss = ours.compute_loss(ours.model, our_batch, num_items_in_batch=our_batch["weight"].sum())
    our_loss.backward()
    their_loss = theirs.compute_loss(theirs.model, theirs._prepare_inputs(next(iter(theirs.get_train_dataloader()))))
    their_loss.backward()
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    difference = head.grad[0] - model.lm_head.weight.grad
    assert difference.norm() < 1e-4 * model.lm_head.weight.grad.norm()


def _feedback_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every kind of feedback, by the same users."""
    ranked = [
        {key: row[key] for key in ("prompt", "user", "metadata", "group")}
        | {"ranking": [row["chosen"], " it is what it is", row["rejected"]]}
        for row in rows[:16]
    ]
    soft = [row | {"label": 0.8} for row in rows[16:28]]
    ties = [row | {"tie": True} for row in rows[28:36]]
    return [*ranked, *soft, *ties, *rows[36:]]


@pytest.mark.parametrize("m_step", ["all", "sampled"])
def test_ties_rankings_and_soft_labels_train_evaluate_and_are_saved(
    m_step: str, make_trainer: Callable[..., MixtureTrainer], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    data = _feedback_rows(rows)
    trainer = make_trainer(data=data, eval_data=data, ties="davidson", tie_strength=0.5, m_step=m_step)
    assert len(trainer.train_comparisons.table) == len(data)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    policy = trainer.policy
    assert policy.config.feedback == {"ties": "davidson", "tie_strength": 0.5}
    report = evaluate(policy, data, new_user_context=(0, 1))
    scores = policy.score(data)
    assert len(scores) == len(data) and not any("dropped" in score for score in scores)
    log_prob = np.log([score["probability"] for score in scores])
    np.testing.assert_allclose(report.predictions["personalised"].log_prob, log_prob, atol=1e-4)


def test_users_evidence_is_the_training_loss(make_trainer: Any, rows: list[dict[str, Any]]) -> None:
    trainer = make_trainer(data=_feedback_rows(rows), ties="rao_kupper")
    trainer.train()
    log_lik = trainer.refresh_evidence()
    batch = trainer.data_collator(range(len(log_lik)))
    with torch.no_grad():
        lik = trainer._likelihoods(trainer.mixture(**batch), batch)
    torch.testing.assert_close(lik.log_lik.double(), log_lik, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("likelihood", ["bt_lse", "policy"])
def test_likelihoods_of_the_mixture_train_by_the_marginal(
    likelihood: str, make_trainer: Callable[..., MixtureTrainer], rows: list[dict[str, Any]]
) -> None:
    fields = {"latent": "pair", "gate": ["metadata"], "gate_learning_rate": 0.1, "learning_rate": 0.02, "beta": 1.0}
    trainer = make_trainer(likelihood=likelihood, eval_data=rows, **fields)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before - 0.01
    batch = trainer.data_collator(range(len(rows)))
    trainer.hold_steps = 0
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["weight"].sum()).item()
    assert loss == pytest.approx(after, abs=1e-4)  # what trains is what is evaluated
    policy = trainer.policy
    probability = [score["probability"] for score in policy.score(rows)]
    assert -np.log(probability).mean() == pytest.approx(after, abs=1e-4)
    ranked = policy.rank(None, rows[0]["prompt"], [rows[0]["chosen"], rows[0]["rejected"]], rows[0]["metadata"])
    assert sum(entry.score for entry in ranked) == pytest.approx(1.0)


def test_dr_dpo_is_the_paper_for_one_expert(make_trainer: Any, rows: list[dict[str, Any]]) -> None:
    trainer = make_trainer(num_experts=1, init="random", latent="pair", dr_dpo_beta=0.5)
    with torch.no_grad():
        for parameter in trainer.mixture.experts.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    batch = trainer.data_collator(range(8))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["weight"].sum())
    lik = trainer._likelihoods(trainer.mixture(**batch), batch)
    paper = -0.5 * torch.log(torch.exp(lik.log_lik[:, 0] / 0.5).mean())
    assert loss.item() == pytest.approx(paper.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trainer.mixture.experts.parameters() if p.requires_grad)


@pytest.mark.parametrize("loss", ["ipo", "hinge", "simpo", "robust"])
def test_other_losses_run_with_two_experts_and_give_probabilities(
    loss: str, make_trainer: Any, rows: list[dict[str, Any]]
) -> None:
    smoothing = 0.1 if loss == "robust" else 0.0
    trainer = make_trainer(loss_type=loss, label_smoothing=smoothing, eval_data=rows, max_steps=6)
    trainer.train()
    metrics = trainer.evaluate()
    policy = trainer.policy
    assert policy.config.feedback_model.loss_type == loss
    probability = np.array([score["probability"] for score in policy.score(rows)])
    assert ((probability > 0) & (probability < 1)).all()
    assert metrics["eval_loss"] == pytest.approx(-np.log(probability).mean(), abs=2e-3)
    policy.adapt("new", rows[:3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "exo_pair"}, "loss_type='exo_pair': expected one of sigmoid"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing with loss_type='ipo'"),
        ({"loss_type": "robust"}, "that is 'sigmoid'"),
        ({"label_noise": 0.1, "loss_type": "hinge"}, "label_noise with loss_type='hinge'"),
        ({"label_noise": 0.1, "label_smoothing": 0.1}, "counted twice"),
        ({"simpo_gamma": 1.0}, "simpo_gamma with loss_type='sigmoid'"),
        ({"loss_type": "ipo", "token_dropout": 0.5}, "token_dropout with loss_type='ipo'"),
        ({"ties": "davidson", "loss_type": "ipo"}, "ties='davidson' with loss_type='ipo'"),
        ({"ties": "davidson", "label_noise": 0.1}, "flipped ties are not modelled"),
        ({"tie_strength": 2.0}, "tie_strength with ties='drop'"),
        ({"tie_strength": 0.0, "ties": "davidson"}, "tie_strength=0.0: positive"),
        ({"dr_dpo_beta": 0.0}, "dr_dpo_beta=0.0: positive"),
        ({"likelihood": "bt_lse", "gate": ["metadata"]}, "latent='auto' with likelihood='bt_lse'"),
        ({"likelihood": "bt_lse", "latent": "pair"}, "gate_update='closed_form' with likelihood='bt_lse'"),
        ({"likelihood": "policy", "latent": "pair", "gate": ["user"]}, "rows of users end at a MAP"),
        ({"likelihood": "policy", "latent": "pair", "gate": ["metadata"], "beta": [0.1] * 3 + [0.2]}, "one policy"),
        ({"likelihood": "bt_lse", "latent": "pair", "gate": ["metadata"], "estep": "hard"}, "there is no E-step"),
        ({"likelihood": "bt_lse", "latent": "pair", "gate": ["metadata"], "m_step": "top"}, "part of the marginal"),
    ],
)
def test_combinations_that_cannot_work_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        validate_options(fields)
    assert message in str(caught.value)


def test_rows_that_a_loss_cannot_read_are_refused(make_trainer: Any, rows: list[dict[str, Any]]) -> None:
    data = _feedback_rows(rows)
    with pytest.raises(ValueError, match="rows with rankings and loss_type='ipo'"):
        make_trainer(data=data, loss_type="ipo")
    assert len(make_trainer(data=data).train_comparisons.table) == len(data) - 8  # ties dropped, the rest read
    soft = [row for row in data if "ranking" not in row]
    with pytest.raises(ValueError, match="rankings or soft labels and likelihood='bt_lse'"):
        make_trainer(data=soft, likelihood="bt_lse", latent="pair", gate=["metadata"])
