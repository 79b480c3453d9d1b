"""What a configuration alone tells, said before a model is loaded or a text is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmix.training.expert_options import HEADS_RATE, LORA_RATE
from prefmix.training.old_runs import refusal

if TYPE_CHECKING:
    from prefmix.training.config import MixtureConfig

logger = logging.getLogger(__name__)

# Below these, what starts at zero is still next to it after a run of hundreds of steps.
SLOW_HEADS, SLOW_LORA = 1e-4, 1e-5


def warn_early(args: MixtureConfig) -> None:
    """Warns of an output folder that `train()` will refuse, and of a learning rate that moves nothing."""
    if not args.should_log:
        return
    resumes = args.resume_from_checkpoint or args.overwrite_output_dir
    problem = None if resumes else refusal(Path(str(args.output_dir)))
    if problem is not None:
        logger.warning("prefmix: train() will refuse a fresh start: %s", problem)
    slow = slow_rate(vars(args))
    if slow is not None:
        logger.warning("prefmix: %s", slow)


def slow_rate(values: Mapping[str, Any]) -> str | None:
    """Why a learning rate is too small for experts that start at zero, with the remedy; None where it is not.

    Whole models, a trained trunk, and experts that start from others move at rates of TRL's size.

    Args:
        values: fields of the configuration.
    """
    starts_at_zero = values["expert_kind"] == "shared_base" and values["trunk"] == "frozen"
    if not (starts_at_zero and values["train_experts"]) or values["init_experts"]:
        return None
    heads = values["branch_depth"] == 0
    what, least, usual = ("heads", SLOW_HEADS, HEADS_RATE) if heads else ("LoRA branches", SLOW_LORA, LORA_RATE)
    rate = values["learning_rate"]
    if rate is None or rate >= least:
        return None
    return (
        f"learning_rate={rate:g}: {what} start at zero and hardly leave it at a rate for whole models, so that experts "
        f"stay the base model; leave it out ({usual:g}), or give a number near that"
    )
