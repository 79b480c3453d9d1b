"""FSDP2: each process holds its share of every parameter, and of the optimizer's state, and gathers what it needs.

The experts, base model included, are sharded with `fully_shard`, block by block; the gate is tiny and stays whole. They
are sharded here and not by accelerate, which would shard the mixture as one module with one entrance, and leaves a
model on a CPU unsharded. A checkpoint holds whole tensors: it resumes on any number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from prefmix.experts.interface import AbstractExperts
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.placement import AbstractPlacement


class Sharded(AbstractPlacement):
    """Every process holds its share of the experts, base model included, and of their moments; the gate is whole."""

    joint = True
    places_itself = True

    def __init__(self, mixture: MixtureModel, accelerator: Accelerator) -> None:
        super().__init__(mixture, accelerator)
        shard(mixture.experts, accelerator.device)

    def trained_tensors(self) -> dict[str, Tensor]:
        """Whole tensors, gathered."""
        return {name: whole_tensor(value) for name, value in super().trained_tensors().items()}

    def load_trained_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Each process keeps its share."""
        load_whole(self.mixture, state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The same as of a run that is not sharded."""
        return whole_optimizer_state(optimizer)

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Each process keeps its share."""
        load_whole_optimizer_state(optimizer, state)

    def share_gradients(self) -> None:
        """`fully_shard` reduces what it shards; the gate is left."""
        average_other_gradients(self.mixture, lambda: self.accelerator.sync_gradients)

    def clip(self, max_norm: float) -> Tensor | None:
        """The norm over all shares."""
        return whole_tensor(self.accelerator.clip_grad_norm_(self.mixture.parameters(), max_norm))

    def save_policy(self, policy: Callable[[], MixturePolicy], folder: Path) -> None:
        """The first process writes while all hold everything."""
        with whole(self.mixture.experts):
            super().save_policy(policy, folder)
            self.accelerator.wait_for_everyone()


def shard(experts: AbstractExperts, device: torch.device) -> None:
    """Shards the experts in place over all processes; their parameters are `DTensor`s afterwards.

    Args:
        experts: on `device`, the same on every process.
        device: of this process.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for model in [module for module in experts.modules() if isinstance(module, PreTrainedModel)]:
        for block in _blocks(model):
            if not isinstance(block, FSDPModule):
                fully_shard(block, mesh=mesh, shard_placement_fn=_axis)
    fully_shard(experts, mesh=mesh, shard_placement_fn=_axis)
    register_fsdp_forward_method(experts, "for_learners")


@contextmanager
def whole(experts: nn.Module) -> Iterator[None]:
    """Inside, every process holds every parameter; all must enter. Changes made inside are lost."""
    parts = [module for module in experts.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, sharded or not; every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, sharded as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


@torch.no_grad()
def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads some whole tensors into a module, sharded or not."""
    own = module.state_dict()
    for name, value in state.items():
        own[name].copy_(like(value, own[name]))


def average_other_gradients(module: nn.Module, due: Callable[[], bool]) -> None:
    """Makes parameters that are not sharded equal on all processes, and keeps them so.

    Args:
        module: holds sharded and other parameters.
        due: whether this backward pass is the last before an optimizer step.
    """

    def average(parameter: Tensor) -> None:
        if due() and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(dist.get_world_size())  # gloo knows no mean

    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter.data, DTensor):
            dist.broadcast(parameter.data, src=0)
            if not getattr(parameter, "_prefmix_averaged", False):  # training may begin more than once
                parameter.register_post_accumulate_grad_hook(average)
                parameter._prefmix_averaged = True  # type: ignore[attr-defined]


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors, the same as of a run that is not sharded."""
    state = optimizer.state_dict()
    entries = {i: {name: _whole(value) for name, value in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": entries}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Takes what `whole_optimizer_state` gave: each moment is sharded as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        i: {
            name: like(value, parameters[i]) if value.shape == parameters[i].shape else value
            for name, value in entry.items()
        }
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _axis(parameter: nn.Parameter) -> Shard:
    """The first axis that divides evenly: along its first, [K, r, D], few experts would lie on few processes."""
    even = [axis for axis, size in enumerate(parameter.shape) if size % dist.get_world_size() == 0]
    return Shard(even[0] if even else 0)


def _whole(value: Any) -> Any:
    return whole_tensor(value).cpu() if isinstance(value, Tensor) else value


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Blocks of the decoder, gathered one at a time; all else is gathered for a whole pass."""
    return [block for part in model.get_decoder().children() if isinstance(part, nn.ModuleList) for block in part]
