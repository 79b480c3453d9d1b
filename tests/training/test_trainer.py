"""What the trainer promises: the bound over minibatches, accumulation, EM, logs, held-out figures, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback

from prefmix.mixture.posterior import group_log_lik, posterior
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.result import training_log_lik
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
Rows = list[dict[str, Any]]


def part_experts(trainer: MixtureTrainer, seed: int = 0) -> None:
    """Gives the experts different random heads, so that likelihoods differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.mixture.experts.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def ready(trainer: MixtureTrainer) -> MixtureTrainer:
    """First responsibilities done, none held, experts parted and the evidence of every row up to date."""
    part_experts(trainer)
    trainer.start_em()
    trainer.em.evidence.update(torch.arange(len(trainer.train_dataset)), training_log_lik(trainer).float())
    trainer.hold_steps = 0
    return trainer


def full_bound(trainer: MixtureTrainer) -> float:
    """The evidence of all groups plus the gate's log prior, from scratch; only for gates that are purely global."""
    table = trainer.train_comparisons.table
    log_lik = training_log_lik(trainer)
    weights = torch.from_numpy(table.weight).double()
    log_weights = trainer.mixture.gate.population_log_weights().double()
    if trainer.latent == "pair":
        evidence = posterior(log_weights.expand_as(log_lik), log_lik).log_evidence @ weights
    else:
        group = torch.from_numpy(trainer._group)
        grouped = group_log_lik(log_lik, group, len(trainer.em.initial), weights)
        evidence = posterior(log_weights.expand_as(grouped), grouped).log_evidence.sum()
    return float(evidence + trainer.mixture.gate.log_prior().double())


def weighted(rows: Rows) -> Rows:
    """The rows with unequal weights."""
    return [row | {"weight": 0.5 + (i % 4)} for i, row in enumerate(rows)]


def gradients(trainer: MixtureTrainer, accumulation: int) -> torch.Tensor:
    """Gradient of one optimizer step over the first 8 rows, as the loop accumulates it."""
    trainer.args.gradient_accumulation_steps = accumulation
    size = 8 // accumulation
    batches = [trainer.data_collator(range(size * i, size * (i + 1))) for i in range(accumulation)]
    denominator = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.model.zero_grad()
    for batch in batches:
        trainer.training_step(trainer.model, batch, denominator)
    return torch.cat([p.grad.flatten() for p in trainer.mixture.parameters() if p.grad is not None])


@pytest.mark.parametrize("latent", ["pair", "user"])
def test_accumulated_batches_give_the_gradient_of_one_large_batch(make_trainer: Make, rows: Rows, latent: str) -> None:
    trainer = ready(make_trainer(data=weighted(rows), latent=latent, init="random"))
    whole = gradients(trainer, accumulation=1)
    assert whole.abs().max() > 1e-3
    for accumulation in (2, 4):
        torch.testing.assert_close(gradients(trainer, accumulation), whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("latent", "alpha"), [("pair", 1.0), ("user", 1.0), ("user", 2.0)])
def test_mean_of_minibatch_losses_over_an_epoch_is_the_full_bound(
    make_trainer: Make, rows: Rows, latent: str, alpha: float
) -> None:
    """Figure 4, last clause: at fixed parameters, with up-to-date evidence and the exact posterior."""
    trainer = ready(make_trainer(data=weighted(rows), latent=latent, gate_prior_alpha=alpha, init="random"))
    total = 0.0
    for batch in trainer.get_train_dataloader():
        # The denominator of one step is its own weight; over an epoch the weighted mean of the losses is the bound.
        weight = batch["weight"].sum()
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=weight)
        total += loss.item() * weight.item()
    assert -total == pytest.approx(full_bound(trainer), rel=1e-5)


@pytest.mark.parametrize(("latent", "alpha"), [("pair", 1.0), ("user", 1.0), ("user", 1.5)])
def test_full_batch_em_never_lowers_evidence_plus_log_prior(
    make_trainer: Make, rows: Rows, latent: str, alpha: float
) -> None:
    bounds: list[float] = []
    trainer = make_trainer(
        data=weighted(rows), latent=latent, gate_prior_alpha=alpha, init="random", init_hold_epochs=0,
        per_device_train_batch_size=48, num_train_epochs=25, learning_rate=3e-3, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", save_strategy="no",
    )  # fmt: skip
    part_experts(trainer)
    step_of = trainer.training_step
    trainer.training_step = lambda *a, **k: (bounds.append(full_bound(trainer)), step_of(*a, **k))[1]  # type: ignore[method-assign]
    trainer.train()
    rises = torch.tensor(bounds).diff()
    assert len(rises) == 24
    assert (rises > -1e-4).all(), rises
    assert bounds[-1] > bounds[0] + 0.01


def test_the_gate_is_the_mean_of_responsibilities(make_trainer: Make, rows: Rows) -> None:
    trainer = make_trainer(data=weighted(rows), latent="pair", init="random", init_hold_epochs=1, num_train_epochs=2)
    trainer.start_em()
    weights = torch.from_numpy(trainer.train_comparisons.table.weight)
    held = (weights @ trainer.em.initial) / weights.sum()
    torch.testing.assert_close(trainer.mixture.gate.population_log_weights().exp(), held)
    trainer.train()
    learned = (weights @ trainer.em.resp) / weights.sum()
    torch.testing.assert_close(trainer.mixture.gate.population_log_weights().exp(), learned)
    assert not torch.allclose(held, learned)


def test_a_warm_start_teaches_all_experts_all_rows_before_they_part(make_trainer: Make) -> None:
    trainer = make_trainer(init="labels", warm_start_epochs=1, init_hold_epochs=1, num_train_epochs=3)
    seen = []
    original = trainer._responsibilities
    trainer._responsibilities = lambda *a: seen.append(original(*a)) or seen[-1]  # type: ignore[method-assign]
    trainer.train()
    steps = len(seen) // 3
    assert all((q.resp == 0.5).all() for q in seen[:steps])
    assert all(((q.resp == 0) | (q.resp == 1)).all() for q in seen[steps : 2 * steps])
    assert all(((q.resp > 0) & (q.resp < 1)).all() for q in seen[2 * steps :])


def test_first_responsibilities_are_held_and_then_let_go(make_trainer: Make) -> None:
    trainer = make_trainer(init="labels", init_hold_epochs=1, num_train_epochs=2)
    seen = []
    original = trainer._responsibilities
    trainer._responsibilities = lambda *a: seen.append(original(*a)) or seen[-1]  # type: ignore[method-assign]
    trainer.train()
    held_entropy = [float(torch.special.entr(q.resp).sum()) for q in seen]
    assert held_entropy[:6] == [0.0] * 6 and all(entropy > 0 for entropy in held_entropy[6:])
    assert trainer.em.evidence.visited.all()


def test_labels_held_to_the_end_are_the_oracle(make_trainer: Make, make_rows: Callable[..., Rows]) -> None:
    trainer = make_trainer(
        data=make_rows(8, 12), init="labels", init_hold_epochs=99, num_train_epochs=20, learning_rate=2e-2
    )
    trainer.train()
    policy = trainer.policy
    weights = torch.stack([policy.weights(user=f"user{u}") for u in range(8)])
    own = weights.argmax(dim=1)
    assert own.tolist() == [0, 1] * 4
    assert weights.amax(dim=1).min() > 0.9


def test_two_opposed_groups_are_found(make_trainer: Make, make_rows: Callable[..., Rows]) -> None:
    trainer = make_trainer(
        data=make_rows(8, 12), eval_data=make_rows(8, 12, seed=5), init_hold_epochs=6, num_train_epochs=12,
        learning_rate=2e-2, eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    evaluation = [line for line in trainer.state.log_history if "eval_loss" in line][-1]
    assert evaluation["eval_accuracy"] > 0.9 > 0.7 > evaluation["eval_population_accuracy"]
    assert evaluation["eval_loss"] < 0.5 < evaluation["eval_population_loss"]
    policy = trainer.policy
    own = torch.stack([policy.weights(user=f"user{u}") for u in range(8)]).argmax(dim=1)
    assert len(set(own[::2].tolist())) == len(set(own[1::2].tolist())) == 1 and own[0] != own[1]


def test_same_seed_same_bits(make_trainer: Make, tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        trainer = make_trainer(output_dir=tmp_path / name, estep="gumbel", estep_temperature=2.0, seed=11)
        trainer.train()
        hashes.append(json.loads((tmp_path / name / "checkpoint-12" / "manifest.json").read_text())["files"])
    same = ("trainable.safetensors", "run_state.safetensors", "optimizer.pt", "rng_state.pth")
    assert {name: hashes[0][name] for name in same} == {name: hashes[1][name] for name in same}


def test_cached_states_and_token_ids_train_the_same_experts(make_trainer: Make, tmp_path: Path) -> None:
    trained = {}
    for mode in ("memory", "disk", "off"):
        trainer = make_trainer(
            output_dir=tmp_path / mode, cache_states=mode, cache_dir=str(tmp_path / "cache"), gate=["prompt"],
            latent="pair", init="random", num_train_epochs=1,
        )  # fmt: skip
        trainer.train()
        trained[mode] = trainer._trained_tensors()
    for mode in ("disk", "off"):
        for name, tensor in trained[mode].items():
            torch.testing.assert_close(tensor, trained["memory"][name], rtol=1e-3, atol=1e-5, msg=f"{mode} {name}")


@pytest.mark.parametrize(
    "fields",
    [
        {"gate": ["global", "metadata"], "latent": "user"},
        {"gate": ["user"], "latent": "pair"},
        {"gate": ["global", "prompt", "user", "metadata"]},
        {"gate_update": "gradient"},
        {"gate_update": "fixed"},
        {"estep": "hard"},
        {"estep": "annealed", "estep_temperature": 4.0},
        {"estep": "gumbel", "gumbel_hard": False, "estep_temperature": 1.0, "estep_temperature_end": 0.5},
        {"num_experts": 1, "init": "probe"},
        {"num_experts": 3, "init": "labels", "head": "logit"},
        {"init": "kmeans", "latent": "pair"},
        {"latent": "pair", "init": "probe"},
        {"bf16": True},
        {"label_noise": 0.1, "beta": [0.1, 0.3]},
    ],
    ids=str,
)
def test_every_combination_trains_saves_and_loads(make_trainer: Make, rows: Rows, fields: dict[str, Any]) -> None:
    trainer = make_trainer(
        eval_data=rows[:12], eval_strategy="epoch", num_train_epochs=2, init_hold_epochs=0.5, **fields
    )
    output = trainer.train()
    assert output.global_step == 12 and torch.isfinite(torch.tensor(output.training_loss))
    loaded = MixturePolicy.from_pretrained(trainer.args.output_dir, device="cpu")
    for user in ("user0", "user1"):
        arguments = {"prompt": "What is it?", "user": user, "metadata": {"user_age": 20}}
        torch.testing.assert_close(loaded.weights(**arguments), trainer.policy.weights(**arguments))
    assert loaded.users.count.sum() == len(rows)


def test_gates_that_read_users_learn_by_gradient_at_their_own_rate(make_trainer: Make) -> None:
    trainer = make_trainer(gate=["global", "user"], gate_learning_rate=0.05)
    assert trainer.latent == "pair"  # auto: a free weight vector for each user goes with `pair`
    groups = trainer.create_optimizer().param_groups
    assert [group["lr"] for group in groups] == [trainer.args.learning_rate, 0.05]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in trainer.mixture.gate.parameters()}


def test_every_figure_is_logged_and_kept_in_the_folder(make_trainer: Make, rows: Rows) -> None:
    trainer = make_trainer(eval_data={"one": rows[:20], "two": rows[20:]}, eval_strategy="epoch")
    trainer.train()
    lines = [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert lines == trainer.state.log_history
    training = next(line for line in lines if "loss" in line)
    names = ["elbo", "evidence", "responsibility_entropy", "usage_0", "usage_1", "gate_entropy", "temperature"]
    names += ["expert_variance"]
    names += [f"rewards/{name}_{k}" for name in ("margins", "accuracies", "chosen", "rejected") for k in (0, 1)]
    trl = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"]
    assert {f"mixture/{name}" for name in names} | set(trl) | {"logps/rejected"} <= training.keys()
    assert training["mixture/usage_0"] + training["mixture/usage_1"] == pytest.approx(1)
    assert training["mixture/elbo"] <= training["mixture/evidence"] + 1e-6
    assert any("eval_one_loss" in line for line in lines) and any("eval_two_accuracy" in line for line in lines)


def test_early_stopping_and_the_best_model(make_trainer: Make, rows: Rows) -> None:
    trainer = make_trainer(
        eval_data=rows, eval_strategy="epoch", num_train_epochs=8, load_best_model_at_end=True, save_total_limit=1,
        metric_for_best_model="eval_loss", learning_rate=20.0, callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    assert len(losses) < 8
    best = min(losses, key=lambda step: losses[step])
    assert trainer.state.best_model_checkpoint == str(Path(trainer.args.output_dir) / f"checkpoint-{best}")
    folders = {path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")}
    assert folders == {f"checkpoint-{best}"}
    assert trainer.evaluate()["eval_population_loss"] == pytest.approx(
        next(
            line["eval_population_loss"] for line in trainer.state.log_history if line.get("eval_loss") == losses[best]
        )
    )


def test_what_cannot_work_is_refused_with_the_reason(
    make_tiny_model: Any, tiny_tokenizer: Any, make_trainer: Make, rows: Rows
) -> None:
    for name in ("ref_model", "peft_config", "data_collator"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            MixtureTrainer(make_tiny_model(), train_dataset=rows, processing_class=tiny_tokenizer, **{name: object()})
    with pytest.raises(ValueError, match="train_dataset=None"):
        MixtureTrainer(make_tiny_model(), processing_class=tiny_tokenizer)
    with pytest.raises(ValueError, match="no tokenizer|without a tokenizer"):
        MixtureTrainer(make_tiny_model(), train_dataset=rows)
    anonymous = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    with pytest.raises(ValueError, match="init='labels'"):
        make_trainer(data=anonymous, init="labels").train()


def test_auto_choices_follow_the_rows(make_trainer: Make, rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    with_users = make_trainer()
    assert (with_users.latent, with_users.init) == ("user", "probe")
    assert "latent=user" in capsys.readouterr().err
    anonymous = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    without = make_trainer(data=anonymous)
    assert (without.latent, without.init) == ("pair", "kmeans")
    assert make_trainer(data=anonymous, num_experts=4).init == "random"  # three prompts are no four clusters
