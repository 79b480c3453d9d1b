"""Which placement a configuration asks for."""

from __future__ import annotations

from accelerate import Accelerator

from prefmix.experts.base_model import BaseModel
from prefmix.experts.spread_experts import SpreadExperts
from prefmix.policy.mixture_model import MixtureModel
from prefmix.training.config import MixtureConfig
from prefmix.training.expert_parallel import Spread
from prefmix.training.placement import AbstractPlacement, Whole
from prefmix.training.sharding import Sharded
from prefmix.training.zero import Zero, zero_problems


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
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        problems = zero_problems(plugin.zero_stage, args)
        if problems:
            raise ValueError("\n".join(problems))
        return Zero(mixture, accelerator)
    if isinstance(mixture.experts, SpreadExperts):
        return Spread(mixture, accelerator, mixture.experts)
    if args.sharding == "fsdp2" and args.world_size > 1:
        if base.source.startswith("<"):
            raise ValueError("sharding='fsdp2' with a model object: give its folder or hub name, which others find")
        return Sharded(mixture, accelerator)
    return Whole(mixture, accelerator)
