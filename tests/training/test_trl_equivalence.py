"""K = 1 is DPO: loss, gradient and loss curve of `MixtureTrainer` equal those of TRL's `DPOTrainer` (method fact 5).

A full head on a frozen trunk against TRL with everything but `lm_head` frozen, on the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

STEPS, BATCH = 20, 8
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "max_steps": STEPS,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "beta": 0.3,
    "seed": 3,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


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
        head="full",
        init="random",
        latent="pair",
        cache_states="memory",
        **SHARED,
    )
    model = make_tiny_model(tie_word_embeddings=False)
    return MixtureTrainer(model, args, train_dataset=pairs, processing_class=tiny_tokenizer)


@pytest.fixture
def theirs(
    ours: MixtureTrainer,
    make_tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    pairs: list[dict[str, Any]],
) -> Any:
    import datasets
    from trl import DPOConfig, DPOTrainer

    model = make_tiny_model(tie_word_embeddings=False).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    in_our_order = [pairs[i] for i in ours._get_train_sampler()]
    args = DPOConfig(
        str(tmp_path / "theirs"),
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        **SHARED,
    )
    return DPOTrainer(
        model=model,
        ref_model=make_tiny_model(tie_word_embeddings=False),
        args=args,
        train_dataset=datasets.Dataset.from_list(in_our_order),
        processing_class=tiny_tokenizer,
    )


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_loss_and_gradient_of_one_batch_equal_trls(ours: MixtureTrainer, theirs: Any) -> None:
    our_batch = next(iter(ours.get_train_dataloader()))
    our_loss = ours.compute_loss(ours.model, our_batch, num_items_in_batch=our_batch["weight"].sum())
    our_loss.backward()
    their_batch = theirs._prepare_inputs(next(iter(theirs.get_train_dataloader())))
    their_loss = theirs.compute_loss(theirs.model, their_batch)
    their_loss.backward()
    (gradient,) = [p.grad for p in ours.mixture.experts.parameters() if p.requires_grad]
    assert _relative(our_loss.detach(), their_loss.detach()) < 1e-5
    assert _relative(gradient[0], theirs.model.lm_head.weight.grad) < 1e-5


def test_twenty_steps_give_the_same_loss_curve(ours: MixtureTrainer, theirs: Any) -> None:
    ours.train()
    theirs.train()
    curves = [
        torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])
        for trainer in (ours, theirs)
    ]
    assert len(curves[0]) == STEPS
    assert curves[0][-1] < 0.6 * curves[0][0]  # the curve moves, so that equality says something
    assert (curves[0] - curves[1]).abs().max() < 1e-3
    for name in ("rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen"):
        ours_line, theirs_line = (trainer.state.log_history[STEPS - 2] for trainer in (ours, theirs))
        assert ours_line[name] == pytest.approx(theirs_line[name], rel=1e-2, abs=1e-3), name
