"""Expert parallelism: expert k and its moments live on process k mod W, which alone writes and reads their files.

A checkpoint has two files for each expert, named by the expert and not by the process, so a run goes on with any number
of processes from one to K.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefmix.experts.spread_experts import SpreadExperts
from prefmix.policy.folder import sync_tree
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.placement import AbstractPlacement
from prefmix.training.processes import share_object
from prefmix.training.sharding import average_other_gradients


class Spread(AbstractPlacement):
    """Each process holds its own experts; gate, evidence and responsibilities are the same everywhere.

    No gradient of an expert crosses processes. The gate's are equal but for the order of sums on a GPU, and averaged so
    that nothing drifts.
    """

    joint = True

    def __init__(self, mixture: MixtureModel, accelerator: Accelerator, experts: SpreadExperts) -> None:
        super().__init__(mixture, accelerator)
        self.experts = experts
        self.places_itself = accelerator.num_processes > 1

    def trained_tensors(self) -> dict[str, Tensor]:
        """The gate, which all processes hold."""
        return {name: value for name, value in self.mixture.state_dict().items() if name.startswith("gate.")}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Hyperparameters, and the gate's moments by name."""
        state = optimizer.state_dict()
        groups = [{name: value for name, value in group.items() if name != "params"} for group in state["param_groups"]]
        return {"state": _moments(optimizer, self.mixture.gate), "param_groups": groups}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Takes what `optimizer_state` gave; moments of experts come with `read_own`."""
        own = optimizer.state_dict()["param_groups"]
        groups = [{**mine, **theirs} for mine, theirs in zip(own, state["param_groups"], strict=True)]
        entries = _by_number(optimizer, self.mixture.gate, state["state"])
        optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def write_own(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """`expert_k.safetensors` and `expert_k.optimizer.pt` of every expert here that trains."""
        for expert, model in self._own_models():
            weights = {name: value.detach().cpu().contiguous() for name, value in _trained(model).items()}
            if weights:
                save_file(weights, str(folder / f"expert_{expert}.safetensors"))
                torch.save(_moments(optimizer, model), folder / f"expert_{expert}.optimizer.pt")

    @torch.no_grad()
    def read_own(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        """Weights, and with an optimizer the moments, of the experts here, whoever wrote them."""
        for expert, model in self._own_models():
            trained = _trained(model)
            if not trained:
                continue
            if optimizer is not None:
                file = folder / f"expert_{expert}.optimizer.pt"
                _set_moments(optimizer, model, torch.load(file, map_location="cpu", weights_only=True))
                continue
            saved = load_file(str(folder / f"expert_{expert}.safetensors"))
            assert saved.keys() == trained.keys(), "check_identity compares where experts started"
            for name, value in saved.items():
                trained[name].copy_(value)

    def share_gradients(self) -> None:
        """The gate alone is shared."""
        average_other_gradients(self.mixture.gate, lambda: self.accelerator.sync_gradients)

    def clip(self, max_norm: float) -> Tensor | None:
        """The norm over all experts, wherever they live, and the gate once."""
        gradients = [p.grad for p in self.experts.parameters() if p.grad is not None]
        squared = nn.utils.get_total_norm(gradients).to(self.accelerator.device) ** 2
        if self.accelerator.num_processes > 1:
            dist.all_reduce(squared)
        gate = nn.utils.get_total_norm([p.grad for p in self.mixture.gate.parameters() if p.grad is not None])
        norm = (squared + gate.to(squared) ** 2).sqrt()
        nn.utils.clip_grads_with_norm_(self.mixture.parameters(), max_norm, norm)
        return norm

    def save_policy(self, policy: Callable[[], MixturePolicy], folder: Path) -> None:
        """Every process writes its experts beside `folder`; the first one moves them in and publishes all of it.

        Raises:
            RuntimeError: on every process, if one of them could not write.
        """
        folder = folder.absolute()
        name = f".{folder.name}.parts-{uuid.uuid4().hex[:8]}"
        parts = folder.parent / share_object(self.accelerator, name)
        finished = policy()
        try:
            self._agree(lambda: self._write_models(parts, finished.tokenizer))
            self._agree(lambda: finished.save_pretrained(folder, experts_folder=parts) if self._is_first else None)
        finally:
            if self._is_first:
                for leftover in folder.parent.glob(f".{folder.name}.parts-*"):
                    shutil.rmtree(leftover, ignore_errors=True)

    def _write_models(self, parts: Path, tokenizer: Any) -> None:
        for expert, model in self._own_models():
            place = parts / f"expert_{expert}"
            place.mkdir(parents=True)
            _save_here(cast(Any, model), place)
            tokenizer.save_pretrained(str(place))
            sync_tree(place)

    def _agree(self, act: Callable[[], None]) -> None:
        """Acts, and fails on every process if it failed on one."""
        problem: Exception | None = None
        try:
            act()
        except Exception as error:  # whatever it is, the others must not wait for this process
            problem = error
        problems: list[str | None] = [None if problem is None else f"{type(problem).__name__}: {problem}"]
        if self.accelerator.num_processes > 1:
            problems = [None] * self.accelerator.num_processes
            dist.all_gather_object(problems, None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        failed = [f"process {i}: {what}" for i, what in enumerate(problems) if what is not None]
        if failed:
            raise RuntimeError(f"nothing was saved, because another process could not write: {'; '.join(failed)}")

    def _own_models(self) -> list[tuple[int, nn.Module]]:
        return [(expert, self.experts.own_model(expert)) for expert in self.experts.own_experts]

    @property
    def _is_first(self) -> bool:
        return bool(self.accelerator.is_main_process)


def _save_here(model: Any, place: Path) -> None:
    """`save_pretrained`, which of its own accord writes on the first process alone."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        model.save_pretrained(str(place))
    finally:
        del model.should_save_on_this_rank
    assert (place / "config.json").is_file(), "transformers wrote no model here"


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _numbers(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """The number of each parameter in `state_dict`, by its id."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {id(parameter): number for number, parameter in enumerate(parameters)}


def _moments(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """State of the module's parameters by name."""
    numbers, state = _numbers(optimizer), optimizer.state_dict()["state"]
    return {
        name: {key: _on_cpu(value) for key, value in state[numbers[id(parameter)]].items()}
        for name, parameter in _trained(module).items()
        if numbers.get(id(parameter)) in state
    }


def _by_number(optimizer: torch.optim.Optimizer, module: nn.Module, moments: Mapping[str, Any]) -> dict[int, Any]:
    numbers, trained = _numbers(optimizer), _trained(module)
    return {numbers[id(trained[name])]: entry for name, entry in moments.items()}


def _set_moments(optimizer: torch.optim.Optimizer, module: nn.Module, moments: Mapping[str, Any]) -> None:
    """Adds to the optimizer's state; all else in it stays."""
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "state": {**state["state"], **_by_number(optimizer, module, moments)}})


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
