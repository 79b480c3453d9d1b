"""Group DRO: one step is the formula, the worst group gains, one group is plain training, resume, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import Interrupt
from torch import Tensor

from prefmix.policy.model_card import model_card
from prefmix.training.options import validate_options
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
Rows = list[dict[str, Any]]
SINGLE: dict[str, Any] = {"num_experts": 1, "latent": "pair", "init": "random", "robust_over": "group"}


@pytest.fixture
def unequal(rows: Rows) -> Rows:
    """24 weighted rows of group a, 6 of group b, who like the opposite."""
    kept = [row for row in rows if row["group"] == "a"] + [row for row in rows if row["group"] == "b"][:6]
    return [row | {"weight": 0.5 + i % 3} for i, row in enumerate(kept)]


def prepared(trainer: MixtureTrainer, log_weights: list[float]) -> MixtureTrainer:
    """Experts that have parted, an adversary that leans, and no responsibilities held."""
    with torch.no_grad():
        for i, parameter in enumerate(trainer.mixture.experts.parameters()):
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    trainer.start_em()
    trainer.refresh_evidence()
    trainer.hold_steps, trainer.state.max_steps = 0, 10
    trainer.em.adversary.log_weights.copy_(torch.tensor(log_weights).log_softmax(0))
    return trainer


def adversary_steps(trainer: MixtureTrainer, *batches: list[int]) -> list[Tensor]:
    """Losses of batches at fixed parameters, each followed by a step of the adversary."""
    found = []
    for batch in batches:
        inputs = trainer.data_collator(batch)
        found.append(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=inputs["weight"].sum()))
        trainer.em.adversary.step(trainer.readers)
    return found


@pytest.mark.parametrize(("latent", "num_experts"), [("pair", 1), ("pair", 2), ("user", 2), ("membership", 2)])
def test_one_step_is_the_formula(make_trainer: Make, unequal: Rows, latent: str, num_experts: int) -> None:
    """Loss sum_g q_g L_g with all rows in the batch, and q_g <- q_g exp(eta L_g) / sum_h, from the bounds by hand."""
    options = SINGLE | {"latent": latent, "num_experts": num_experts, "robust_step": 0.7, "gate_update": "gradient"}
    trainer = prepared(make_trainer(data=unequal, **options), [0.2, 1.0])
    batch, seen = trainer.data_collator(range(len(unequal))), []
    original = trainer.objective.bound
    trainer.objective.bound = lambda *a: seen.append(original(*a)) or seen[-1]  # type: ignore[method-assign]
    q = trainer.em.adversary.log_weights.exp().clone()
    trainer.mixture.gate.log_prior = lambda: torch.zeros(())  # type: ignore[method-assign]
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["weight"].sum())
    in_b = torch.tensor([row["group"] == "b" for row in unequal])
    bound, weight = seen[0].bound, batch["weight"]
    mean = torch.stack([-bound[of].sum() / weight[of].sum() for of in (~in_b, in_b)])
    expected = (q * mean.double()).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = [p for p in trainer.mixture.parameters() if p.requires_grad]
    by_hand = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert sum(gradient is not None for gradient in found) > 0
    for got, wanted in zip(found, by_hand, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    trainer.em.adversary.step(trainer.readers)
    moved = q * torch.exp(0.7 * mean.detach().double())
    torch.testing.assert_close(trainer.em.adversary.log_weights.exp(), moved / moved.sum())


def test_batches_estimate_the_same_loss_and_an_absent_group_keeps_its_last(make_trainer: Make, unequal: Rows) -> None:
    trainer = prepared(make_trainer(data=unequal, **SINGLE), [0.0, 0.0])
    everything = list(range(len(unequal)))
    total = torch.tensor([row["weight"] for row in unequal]).sum()

    def weighed(batch: list[int]) -> Tensor:
        inputs = trainer.data_collator(batch)
        return trainer.compute_loss(trainer.model, inputs, num_items_in_batch=total)

    parts = sum(weighed(everything[start::7]) for start in range(7))
    torch.testing.assert_close(parts, weighed(everything))
    adversary = trainer.em.adversary
    adversary.step(trainer.readers)
    adversary.loss.fill_(torch.nan)
    adversary_steps(trainer, [0, 1, 2])
    assert adversary.loss.isnan().tolist() == [False, True]
    assert adversary.figures().keys() >= {"mixture/worst_group_loss", "mixture/group_loss/a"}
    adversary_steps(trainer, [3, 28, -1 - 28], [4, 5])  # the third place is a copy of row 28
    seen = adversary.loss.clone()
    before = adversary.log_weights.clone()
    adversary_steps(trainer, [6])
    assert seen[1] == adversary.loss[1] and seen[0] != adversary.loss[0]
    gain = adversary.log_weights - before
    torch.testing.assert_close(gain[1] - gain[0], 0.05 * (adversary.loss[1] - adversary.loss[0]))


def test_a_gate_in_closed_form_counts_groups_as_the_adversary_does(make_trainer: Make, unequal: Rows) -> None:
    for latent in ("pair", "user"):
        trainer = prepared(make_trainer(data=unequal, **SINGLE | {"num_experts": 2, "latent": latent}), [0.0, 1.5])
        trainer.em.resp.copy_(torch.rand(trainer.em.resp.shape).softmax(1))
        q = trainer.em.adversary.log_weights.exp()
        weight = torch.tensor([row["weight"] for row in unequal]).double()
        in_b = torch.tensor([row["group"] == "b" for row in unequal])
        group = torch.from_numpy(trainer._group)
        by_hand = torch.zeros(2, dtype=torch.float64)
        for c, of in zip(q, (~in_b, in_b), strict=True):
            factor = c * weight.sum() / weight[of].sum()
            n = torch.ones(len(group)) if latent == "pair" else trainer.em.group_weight[group].double()
            by_hand += ((weight * factor / n).unsqueeze(1) * trainer.em.resp[group].double())[of].sum(0)
        torch.testing.assert_close(trainer.em.mean_resp().mean.double(), by_hand / by_hand.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fields", [{}, {"num_experts": 2, "latent": "user"}])
def test_one_group_is_plain_training(make_trainer: Make, rows: Rows, tmp_path: Path, fields: dict[str, Any]) -> None:
    same = [row | {"group": "all", "weight": 0.5 + i % 3} for i, row in enumerate(rows)]
    ends = []
    for over in ("group", None):
        options = SINGLE | fields | {"robust_over": over, "learning_rate": 5e-2, "save_strategy": "no"}
        trainer = make_trainer(output_dir=tmp_path / str(over), data=same, **options)
        trainer.train()
        ends.append(list(trainer.mixture.parameters()) + list(trainer.mixture.buffers()))
    for first, second in zip(*ends, strict=True):
        assert torch.equal(first, second)


def test_the_worst_group_is_better_off(make_trainer: Make, tmp_path: Path) -> None:
    """Groups of 20 and 5 rows judge one pair of answers the other way round: a coin, log 2, is best for the worst."""
    texts = {"prompt": "What is it?", "chosen": " the film was great", "rejected": " sky is green"}
    turned = texts | {"chosen": texts["rejected"], "rejected": texts["chosen"]}
    opposed = [texts | {"group": "a", "user": "user0"}] * 20 + [turned | {"group": "b", "user": "user1"}] * 5
    in_b, worst = torch.tensor([row["group"] == "b" for row in opposed]), {}
    for over in (None, "group", "user"):
        options = SINGLE | {"robust_over": over, "learning_rate": 2e-2, "beta": 0.5, "num_train_epochs": 15}
        step = {} if over is None else {"robust_step": 0.1}
        trainer = make_trainer(output_dir=tmp_path / str(over), data=opposed, save_strategy="no", **options | step)
        trainer.train()
        log_lik = trainer.refresh_evidence()[:, 0]
        worst[over] = max(float(-log_lik[of].mean()) for of in (~in_b, in_b))
        card = model_card(trainer.policy.config, None, trainer.policy.record)
        line = [line for line in trainer.state.log_history if "loss" in line][-1]
        assert ("(group DRO)" in card) == ("mixture/worst_group_loss" in line) == (over is not None)
        if over == "group":
            weights = trainer.policy.record["robust"]["weights"]
            assert weights == pytest.approx({g: line[f"mixture/group_weight/{g}"] for g in "ab"}, abs=1e-4)
            assert 0.3 < weights["b"] < 0.7 and "b 0." in card
        if over == "user":  # names of users stay out of logs and cards
            assert "user1" not in card and not any("user" in name for name in line)
    assert worst[None] > 1.3  # the average row's best is log 5 = 1.61 for group b
    assert worst["group"] < 0.85 and worst["user"] == pytest.approx(worst["group"])


def test_a_killed_run_resumes_bit_for_bit(make_trainer: Make, unequal: Rows, tmp_path: Path) -> None:
    options = SINGLE | {"num_experts": 2, "latent": "user", "learning_rate": 2e-2, "robust_step": 0.5}
    options |= {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 4}
    whole = make_trainer(output_dir=tmp_path / "whole", data=unequal, **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(output_dir=tmp_path / "killed", data=unequal, callbacks=[Interrupt(6)], **options).train()
    again = make_trainer(output_dir=tmp_path / "killed", data=unequal, **options)
    again.train(resume_from_checkpoint=True)
    for first, second in zip(whole.mixture.parameters(), again.mixture.parameters(), strict=True):
        assert torch.equal(first, second)
    state, other = whole.em.adversary.state_dict(), again.em.adversary.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state) and len(state) == 2
    assert float(state["group_log_weights"].exp().max()) > 0.51
    for changed, named in (({"robust_step": 0.1}, "robust_step"), ({"robust_over": "user"}, "robust_over")):
        with pytest.raises(ValueError, match=named):
            make_trainer(output_dir=tmp_path / "killed", data=unequal, **options | changed).train(
                resume_from_checkpoint=True
            )
    moved = [row | {"group": "a"} if i == 29 else row for i, row in enumerate(unequal)]
    with pytest.raises(ValueError, match="robust_groups_sha256"):
        make_trainer(output_dir=tmp_path / "killed", data=moved, **options).train(resume_from_checkpoint=True)


def test_what_cannot_work_is_refused_by_name(make_trainer: Make, unequal: Rows) -> None:
    nameless = [{name: value for name, value in row.items() if name != "group"} for row in unequal[:2]]
    with pytest.raises(ValueError, match="robust_over='group': 2 training rows name no group; add the column 'group'"):
        make_trainer(data=[*unequal[2:], *nameless], **SINGLE)
    for options, named in (
        ({"robust_over": "group", "dr_dpo_beta": 1.0}, "dr_dpo_beta with robust_over='group': its aggregate"),
        ({"robust_over": "group", "robust_step": 0.0}, "robust_step=0.0: positive"),
        ({"robust_step": 0.5}, "robust_step with robust_over=null"),
        ({"robust_over": "groups"}, "robust_over='groups': expected"),
    ):
        with pytest.raises(ValueError, match=named):
            validate_options(options)
