"""Which placement a configuration asks for."""

from __future__ import annotations

from accelerate import Accelerator
from transformers.trainer_utils import SaveStrategy

from prefmix.experts.base_model import BaseModel
from prefmix.experts.spread_experts import SpreadExperts
from prefmix.policy.mixture_model import MixtureModel
from prefmix.training.config import MixtureConfig
from prefmix.training.expert_parallel import Spread
from prefmix.training.placement import AbstractPlacement, Whole
from prefmix.training.processes import check_deepspeed
from prefmix.training.sharding import Sharded


def place(mixture: MixtureModel, accelerator: Accelerator, args: MixtureConfig, base: BaseModel) -> AbstractPlacement:
    """Places a mixture that stands whole on this process (or, spread, with this process's experts).

    Args:
        mixture: experts and gate; changed in place where they are sharded.
        accelerator: knows the processes.
        args: says how.
        base: what the experts grow from.

    Raises:
        ValueError: a combination that cannot work.
    """
    check_deepspeed(accelerator, SaveStrategy(args.save_strategy).value)
    if isinstance(mixture.experts, SpreadExperts):
        return Spread(mixture, accelerator, mixture.experts)
    if args.sharding == "fsdp2" and args.world_size > 1:
        if base.source.startswith("<"):
            raise ValueError("sharding='fsdp2' with a model object: give its folder or hub name, which others find")
        return Sharded(mixture, accelerator)
    return Whole(mixture, accelerator)
