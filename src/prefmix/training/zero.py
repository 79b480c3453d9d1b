"""DeepSpeed ZeRO: gradients and moments (stage 2), or parameters too (stage 3, base included), shared out.

DeepSpeed's engine does the sharing; here is what a checkpoint and a policy need of it. Like all of ours, a checkpoint
holds whole tensors, through DeepSpeed's functions for single parameters: it resumes on any number of processes, with or
without DeepSpeed. Its own format would resume on the same number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.config import MixtureConfig
from prefmix.training.placement import AbstractPlacement

PARAMETERS_SHARED = 3
IN_USE = -1


class Zero(AbstractPlacement):
    """What DeepSpeed shares out among all processes, from its first step on.

    In stage 3 the base is shared out, and gathered layer by layer. What trains stays whole beside its share, because
    it is read outside of the forward passes that DeepSpeed watches: so does every tensor that is not larger.
    """

    def __init__(self, mixture: MixtureModel, accelerator: Accelerator) -> None:
        super().__init__(mixture, accelerator)
        plugin = accelerator.state.deepspeed_plugin
        self._in_shares = plugin.zero_stage == PARAMETERS_SHARED
        self.joint = self._in_shares
        self._parameters: list[nn.Parameter] = []
        self._group_sizes: list[int] = []
        self._begun = False
        if self._in_shares:
            zero = plugin.deepspeed_config["zero_optimization"]
            largest = max((p.numel() for p in mixture.parameters() if p.requires_grad), default=0)
            name, default = "stage3_param_persistence_threshold", 100_000
            zero[name] = max(largest, zero[name] if isinstance(zero.get(name), int | float) else default)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """DeepSpeed puts flat tensors in the place of parameters; their order is that of a checkpoint."""
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._group_sizes = [len(group["params"]) for group in optimizer.param_groups]

    def begin(self) -> None:
        """The engine has taken over; what stays whole is whole from the first step on."""
        self._begun = True
        self.before_pass()

    def before_pass(self) -> None:
        """In stage 3, keeps whole what trains: a step of the optimizer, and early passes, would leave shares alone."""
        if not self._in_shares:
            return
        kept = [cast(Any, parameter) for parameter in self._parameters]
        gone = [parameter for parameter in kept if parameter.ds_status != parameter.ds_status.AVAILABLE]
        if gone:
            gone[0].all_gather(gone)
        for parameter in kept:
            parameter.ds_active_sub_modules.add(IN_USE)  # by a module that never ends

    def trained_tensors(self) -> dict[str, Tensor]:
        """Whole tensors, on every process."""
        with self._whole(self._trained().values()):
            return {name: value.detach().clone() for name, value in super().trained_tensors().items()}

    @torch.no_grad()
    def load_trained_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Into the parameters, and into the copies that the optimizer steps."""
        with self._whole(self._trained().values(), changed=True):
            own = self.mixture.state_dict()
            assert state.keys() == super().trained_tensors().keys(), "check_identity compares the shape of the mixture"
            for name, value in state.items():
                own[name].copy_(value)
        if self._begun:
            for name, parameter in self._trained().items():
                if parameter.requires_grad:
                    self._set(parameter, state[name].to(parameter.device), None)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The same as of a run without DeepSpeed."""
        from deepspeed.utils import safe_get_full_optimizer_state

        zero = _engine_optimizer(optimizer)
        self._link(zero)
        first = next(iter(zero.optimizer.state.values()))
        single = {key: value for key, value in first.items() if _is_single(value)}
        moments = [key for key, value in first.items() if not _is_single(value)]
        entries = {
            number: {key: safe_get_full_optimizer_state(parameter, key).cpu().clone() for key in moments}
            # Copies: a tensor that two parameters share would count every step twice.
            | {key: torch.as_tensor(value).cpu().clone() for key, value in single.items()}
            for number, parameter in enumerate(self._parameters)
        }
        return {"state": entries, "param_groups": self._groups(zero)}

    @torch.no_grad()
    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Takes whole tensors; each process keeps its share."""
        zero = _engine_optimizer(optimizer)
        for group, saved in zip(zero.optimizer.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        if not state["state"]:
            return
        like = next(iter(state["state"].values()))
        for flat in self._flat(zero):
            zero.optimizer.state[flat] = {
                key: value.clone().to(flat.device) if _is_single(value) else torch.zeros_like(flat)
                for key, value in like.items()
            }
        self._link(zero)
        for number, entry in state["state"].items():
            for key, value in entry.items():
                if not _is_single(value):
                    self._set(self._parameters[number], value.to(self._parameters[number].device), key)

    def share_gradients(self) -> None:
        """The engine does."""

    def save_policy(self, policy: Callable[[], MixturePolicy], folder: Path) -> None:
        """The first process writes while all hold everything."""
        with self._whole(self.mixture.parameters()):
            super().save_policy(policy, folder)
            self.accelerator.wait_for_everyone()

    def _trained(self) -> dict[str, nn.Parameter]:
        named = self.mixture.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad or name.startswith("gate.")}

    @contextmanager
    def _whole(self, parameters: Iterable[nn.Parameter], changed: bool = False) -> Iterator[None]:
        """Inside, every process holds these parameters whole; `changed`: what the first process writes is kept."""
        if not (self._in_shares and self._begun):
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        for parameter in self._parameters:
            cast(Any, parameter).ds_active_sub_modules.discard(IN_USE)
        with GatheredParameters(list(parameters), modifier_rank=0 if changed else None):
            yield
        self.before_pass()  # what was gathered here has gone again

    def _flat(self, zero: Any) -> list[Tensor]:
        """The flat tensors that the optimizer steps; this process's shares."""
        return list(zero.fp32_partitioned_groups_flat if self._in_shares else zero.single_partition_of_fp32_groups)

    def _link(self, zero: Any) -> None:
        """Ties moments to parameters: DeepSpeed does so in the first step, before later groups have any."""
        if self._in_shares:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for parameters, flat in zip(zero.bit16_groups, self._flat(zero), strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """A moment, or without a key the copy of a parameter that the optimizer steps, from a whole tensor."""
        from deepspeed import utils

        if not self._in_shares and key is None:
            utils.safe_set_full_fp32_param(parameter, value)
            return
        if not self._in_shares:
            utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        size = -(-value.numel() // processes)
        share = nn.functional.pad(value.flatten(), (0, processes * size - value.numel()))[index * size :][:size]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, share)
        else:
            utils.safe_set_local_optimizer_state(parameter, share, key)

    def _groups(self, zero: Any) -> list[dict[str, Any]]:
        groups, first = [], 0
        for group, size in zip(zero.optimizer.param_groups, self._group_sizes, strict=True):
            hyperparameters = {name: value for name, value in group.items() if name != "params"}
            groups.append({**hyperparameters, "params": list(range(first, first + size))})
            first += size
        return groups


def load_models_whole(args: MixtureConfig) -> None:
    """Keeps transformers from sharing out a model while one process alone loads it; the engine shares it out later."""
    if args.deepspeed_plugin is not None:
        unset_hf_deepspeed_config()


def zero_problems(stage: int, args: MixtureConfig) -> list[str]:
    """Why ZeRO cannot do what a configuration asks for, or nothing."""
    problems = []
    if args.expert_parallel:
        problems.append("expert_parallel=true under DeepSpeed: both place the experts; start it with plain torchrun")
    if stage == PARAMETERS_SHARED and args.expert_kind == "independent":
        problems.append("zero_stage=3 with expert_kind='independent': use expert_parallel=true with plain torchrun")
    if stage == PARAMETERS_SHARED and args.freeze_experts:
        problems.append("freeze_experts under zero_stage=3: no process holds an expert whole; use zero_stage=2")
    if stage == PARAMETERS_SHARED and args.trunk == "full":
        problems.append("trunk='full' under zero_stage=3: what trains is not shared out; use trunk='lora' or stage 2")
    return problems


def _engine_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's optimizer inside accelerate's; its `optimizer` is the one that steps."""
    return cast(Any, optimizer).optimizer


def _is_single(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0
