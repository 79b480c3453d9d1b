"""Training with LoRA branches and trained trunks: K = 1 is TRL's LoRA DPO; every choice trains, resumes and saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_steps": 12,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "beta": 0.3,
    "seed": 3,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
RANK, ALPHA = 4, 12


@pytest.fixture
def pairs(make_rows: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Comparisons of people who agree, so that the loss falls."""
    rows = make_rows(num_users=40, rows_per_user=8)
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows if row["group"] == "a"]


@pytest.fixture
def ours(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, pairs: list[dict[str, Any]]
) -> MixtureTrainer:
    args = MixtureConfig(
        str(tmp_path / "ours"),
        num_experts=1,
        branch_depth=-1,
        expert_rank=RANK,
        lora_alpha=ALPHA,
        init="random",
        latent="pair",
        **SHARED,
    )
    return MixtureTrainer(make_tiny_model(), args, train_dataset=pairs, processing_class=tiny_tokenizer)


@pytest.fixture
def theirs(
    ours: MixtureTrainer,
    make_tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    pairs: list[dict[str, Any]],
) -> Any:
    """TRL's trainer with PEFT's LoRA on all linear layers, its A copied from ours."""
    import datasets
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        str(tmp_path / "theirs"),
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        **SHARED,
    )
    trainer = DPOTrainer(
        model=make_tiny_model(),
        args=args,
        train_dataset=datasets.Dataset.from_list([pairs[i] for i in ours._get_train_sampler()]),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    copy_to_peft(ours, trainer.model)
    return trainer


def copy_to_peft(ours: MixtureTrainer, model: torch.nn.Module) -> None:
    state = ours.mixture.experts.expert_state(0)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(state) == len(parameters)
    with torch.no_grad():
        for name, value in state.items():
            parameters[peft_name(name)].copy_(value)


def peft_name(name: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}.default.weight"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("moved", [False, True])
def test_loss_and_gradient_of_one_batch_equal_trls(ours: MixtureTrainer, theirs: Any, moved: bool) -> None:
    if moved:  # at the start the gradient of every A is zero
        with torch.no_grad():
            for parameter in ours.mixture.experts.branches.parameters():
                parameter += 0.05 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(parameter))
                )
        copy_to_peft(ours, theirs.model)
    our_batch = next(iter(ours.get_train_dataloader()))
    our_loss = ours.compute_loss(ours.model, our_batch, num_items_in_batch=our_batch["weight"].sum())
    our_loss.backward()
    their_loss = theirs.compute_loss(theirs.model, theirs._prepare_inputs(next(iter(theirs.get_train_dataloader()))))
    their_loss.backward()
    assert relative(our_loss.detach(), their_loss.detach()) < 1e-5
    gradients = {name: p.grad[0] for name, p in ours.mixture.experts.branches.stacks().items()}
    theirs_by_name = dict(theirs.model.named_parameters())
    ours_flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
    theirs_flat = torch.cat([theirs_by_name[peft_name(name)].grad.flatten() for name in gradients])
    assert theirs_flat.norm() > 1e-3
    assert relative(ours_flat, theirs_flat) < 1e-5


def test_a_run_gives_the_same_loss_curve(ours: MixtureTrainer, theirs: Any) -> None:
    ours.train()
    theirs.train()
    curves = [
        torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])
        for trainer in (ours, theirs)
    ]
    assert curves[0][-1] < 0.8 * curves[0][0]  # the curve moves, so that equality says something
    assert (curves[0] - curves[1]).abs().max() < 1e-3


CHOICES: list[dict[str, Any]] = [
    {"branch_depth": 1},
    {"branch_depth": -1, "head": "hidden", "gradient_checkpointing": True},
    {"branch_depth": 1, "trunk": "lora", "token_dropout": 0.3},
    {"branch_depth": 1, "trunk": "full", "trunk_learning_rate": 1e-3},
    {"branch_depth": 0, "trunk": "full", "gate": ["prompt"], "latent": "pair", "gradient_checkpointing": True},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: ",".join(f"{k}={v}" for k, v in choice.items()))
def test_training_resumes_bit_for_bit_and_the_policy_reads_what_was_trained(
    make_trainer: Callable[..., MixtureTrainer], rows: list[dict[str, Any]], tmp_path: Path, choice: dict[str, Any]
) -> None:
    fields = {"cache_states": "auto", "cache_dir": str(tmp_path / "cache"), "save_strategy": "epoch"} | choice
    whole = make_trainer(tmp_path / "whole", eval_data=rows[:8], **fields)
    whole.train()
    assert whole.evaluate()["eval_loss"] > 0
    parted = make_trainer(tmp_path / "whole", **fields)
    last = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in last[1:]:  # only the first epoch is left
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    (tmp_path / "whole" / "finished.json").unlink()
    parted.train(resume_from_checkpoint=True)
    trained = {name: p for name, p in whole.mixture.named_parameters() if p.requires_grad}
    again = dict(parted.mixture.named_parameters())
    start = dict(make_trainer(tmp_path / "start", **fields).mixture.named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in trained.items())
    assert any(not torch.equal(p, start[name]) for name, p in trained.items() if ".trunk." in name) == (
        choice.get("trunk") is not None
    )
    policy = MixturePolicy.from_pretrained(tmp_path / "whole" / "policy")
    texts = ["What is it?", "Write a review."], [" great", " the film was bad"]
    expected = whole.policy.log_prob(*texts, per_expert=True)
    torch.testing.assert_close(policy.log_prob(*texts, per_expert=True), expected, rtol=1e-5, atol=1e-5)
    reply = policy.generate("What is it?", decoder="mixture", max_new_tokens=3, seed=0)
    assert reply is not None
