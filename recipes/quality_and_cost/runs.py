"""Trains one arm at one learning rate, counts its CPU seconds, and scores held-out pairs.

Legend: B pairs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from arms import EVERYWHERE, Arm
from pairs import Pairs, Splits
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from prefmix.data.tokenization import tokenize_rows
from prefmix.evaluation.scoring import score_rows
from prefmix.experts.adapter_files import adapter_state
from prefmix.experts.base_model import BaseModel, load_base
from prefmix.experts.build import build_experts
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.trunk_cache import TrunkStates, build_trunk_states
from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

BETA = 0.1
BATCH = 4  # pairs; few pairs in larger batches would be too few steps
TRL_RANK = 16
# What both trainers are told; everything else is the default of both.
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "beta": BETA,
    "lr_scheduler_type": "linear",
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "epoch",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),
}


class Workplace(NamedTuple):
    """What all runs of a process share.

    Attributes:
        base: the base model.
        rows: of all arms.
        folder: of cached states, runs and states of experts.
    """

    base: BaseModel
    rows: Splits
    folder: Path


class Trained(NamedTuple):
    """One trained expert.

    Attributes:
        experts: one expert over the workplace's base.
        seconds: CPU seconds of the training loop.
        steps: optimizer steps.
        parameters: how many numbers were trained.
    """

    experts: AbstractExperts
    seconds: float
    steps: int
    parameters: int


class CpuClock(TrainerCallback):
    """CPU seconds between the first and the last step: no loading, no tokenizing, no saving."""

    seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Starts."""
        self._start = time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stops."""
        self.seconds = time.process_time() - self._start


class TrainerWithoutPolicy(MixtureTrainer):
    """Leaves no policy folder: writing one reads all training rows again for what they say of users, none here."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing."""


def train(arm: Arm, rate: float, seed: int, place: Workplace) -> Trained:
    """Trains an arm on its rows."""
    return _train_trl(arm, rate, seed, place) if arm.trl else _train_ours(arm, rate, seed, place)


def read_states(arm: Arm, place: Workplace) -> float:
    """Reads the training texts of heads once, and keeps their states; CPU seconds."""
    table = tokenize_rows(_rows_of(arm, place), place.base.tokenizer, progress=False)
    cache = place.folder / states_name(arm)
    shutil.rmtree(cache, ignore_errors=True)
    start = time.process_time()
    build_trunk_states(place.base, table.texts, cache_dir=cache, progress=False)
    return time.process_time() - start


def score(experts: AbstractExperts, pairs: Pairs, place: Workplace) -> np.ndarray:
    """[B] margins of held-out pairs, nats."""
    states = held_out_states(pairs, place) if experts.describe()["kind"] == "shared_base" else None
    experts.eval()
    with torch.no_grad():
        scores = score_rows(experts, pairs.table, beta=[BETA], states=states)
    return (scores.log_lik - scores.log_lik_reversed)[:, 0].numpy()


def reference_logits(pairs: Pairs, place: Workplace) -> np.ndarray:
    """[B] log pi_ref(chosen) - log pi_ref(rejected), nats."""
    untrained = build_experts(
        place.base.model, {"kind": "shared_base", "num_experts": 1, "head": "hidden", "rank": 1, "branch_depth": 0}
    )
    with torch.no_grad():
        return score_rows(untrained, pairs.table, beta=[BETA], states=held_out_states(pairs, place)).ref_logit.numpy()


def held_out_states(pairs: Pairs, place: Workplace) -> TrunkStates:
    """Cached states of held-out texts; their cost is nobody's training."""
    return build_trunk_states(place.base, pairs.table.texts, cache_dir=place.folder / "held_out", progress=False)


def products_per_second(size: int = 1024, repetitions: int = 8) -> float:
    """Float32 matrix products now, GF per CPU second: what a busy neighbour takes away shows here."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    start = time.process_time()
    for _ in range(repetitions):
        torch.mm(a, b)
    return 2e-9 * size**3 * repetitions / (time.process_time() - start)


def state_of(experts: AbstractExperts) -> dict[str, Tensor]:
    """Everything that was trained, on the CPU and in one piece, as files want it."""
    return {name: value.detach().cpu().contiguous() for name, value in experts.expert_state(0).items()}


def with_state(description: dict[str, Any], state: dict[str, Tensor], place: Workplace) -> AbstractExperts:
    """The expert that `state_of` wrote down."""
    experts = build_experts(place.base.model, description)
    experts.load_expert_state(0, state)
    return experts


def _train_ours(arm: Arm, rate: float, seed: int, place: Workplace) -> Trained:
    folder, clock = place.folder / "run", CpuClock()
    args = MixtureConfig(
        str(folder),
        num_experts=1,
        latent="pair",
        init="random",
        learning_rate=rate,
        num_train_epochs=arm.epochs,
        seed=seed,
        overwrite_output_dir=True,
        cache_dir=str(place.folder / states_name(arm)),
        bf16=False,
        **SHARED,
        **arm.options,
    )
    trainer = TrainerWithoutPolicy(place.base, args, train_dataset=_rows_of(arm, place), callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return Trained(trainer.mixture.experts, clock.seconds, trainer.state.global_step, _trained_numbers(trainer))


def _train_trl(arm: Arm, rate: float, seed: int, place: Workplace) -> Trained:
    """TRL's trainer as it comes, but in float32 and without gradient checkpointing, which would cost it a third."""
    import datasets
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    folder, clock = place.folder / "trl", CpuClock()
    args = DPOConfig(
        str(folder),
        learning_rate=rate,
        num_train_epochs=arm.epochs,
        seed=seed,
        bf16=False,
        gradient_checkpointing=False,
        **SHARED,
    )
    trainer = DPOTrainer(
        model=load_base(place.base.source, dtype=torch.float32).model,
        args=args,
        train_dataset=datasets.Dataset.from_list(place.rows.few),
        processing_class=place.base.tokenizer,
        peft_config=LoraConfig(r=TRL_RANK, lora_alpha=2 * TRL_RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    experts = build_experts(place.base.model, _description(EVERYWHERE, TRL_RANK))
    experts.load_expert_state(0, adapter_state(experts, folder / "adapter"))
    shutil.rmtree(folder, ignore_errors=True)
    return Trained(experts, clock.seconds, trainer.state.global_step, _trained_numbers(trainer))


def _rows_of(arm: Arm, place: Workplace) -> list[dict[str, Any]]:
    return place.rows.many if arm.more_pairs else place.rows.few


def _description(branch_depth: int, rank: int) -> dict[str, Any]:
    return {"kind": "branched", "num_experts": 1, "branch_depth": branch_depth, "head": "none", "rank": rank}


def _trained_numbers(trainer: Any) -> int:
    return sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)


def cost(arm: Arm, seconds: float, reading: Mapping[str, float]) -> float:
    """CPU seconds of a run: of the loop, and for heads of reading the trunk's states before the first epoch.

    Args:
        arm: what ran.
        seconds: of the loop.
        reading: CPU seconds of reading the states of the few and of more rows, by `states_name`.
    """
    return seconds + (reading[states_name(arm)] if reads_states(arm) else 0.0)


def reads_states(arm: Arm) -> bool:
    """Whether an arm trains on cached states of the trunk."""
    return arm.options.get("branch_depth") == 0


def states_name(arm: Arm) -> str:
    """Which rows' states an arm reads."""
    return "states_of_more_pairs" if arm.more_pairs else "states"
