"""Where weights, gradients and moments live among the processes of a run, and their way into files and back.

One interface, so that the trainer asks no questions; a leaf for each way: everything everywhere (here), shares of all
tensors (`sharding`), experts on processes of their own (`expert_parallel`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy


class AbstractPlacement(ABC):
    """What differs between ways of placing a mixture; here for one process, and for several that all hold everything.

    Every process calls every method, at the same time.

    Attributes:
        joint: whether experts can be run by all processes together only.
        places_itself: whether gradients are shared here, so that nobody may wrap the mixture for that.
    """

    joint = False
    places_itself = False

    def __init__(self, mixture: MixtureModel, accelerator: Accelerator) -> None:
        self.mixture = mixture
        self.accelerator = accelerator

    def trained_tensors(self) -> dict[str, Tensor]:
        """Whole parameters of the experts and everything of the gate; the frozen base is not saved."""
        trained = {name for name, parameter in self.mixture.named_parameters() if parameter.requires_grad}
        state = self.mixture.state_dict()
        return {name: value for name, value in state.items() if name in trained or name.startswith("gate.")}

    @torch.no_grad()
    def load_trained_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `trained_tensors` gave."""
        own = self.mixture.state_dict()
        assert state.keys() == self.trained_tensors().keys(), "check_identity compares the shape of the mixture"
        for name, value in state.items():
            own[name].copy_(value)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """`optimizer.state_dict()` of whole tensors."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Takes what `optimizer_state` gave."""
        optimizer.load_state_dict(dict(state))

    def write_own(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Writes what this process alone holds into a checkpoint that is being prepared."""
        return

    def read_own(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        """Reads from a checkpoint what this process alone holds: moments into the optimizer, or weights without one."""
        return

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Sees the optimizer before anything is wrapped around it."""
        return

    def begin(self) -> None:
        """Once mixture and optimizer are wrapped, before anything is loaded into them or stepped."""
        return

    def before_pass(self) -> None:
        """Before every forward pass of training."""
        return

    @abstractmethod
    def share_gradients(self) -> None:
        """Before the first step: starts all processes alike, and keeps gradients that they share alike."""

    def clip(self, max_norm: float) -> Tensor | None:
        """Scales all gradients to a global norm of at most `max_norm`; returns the norm, or None: left to `Trainer`."""
        return None

    def save_policy(self, policy: Callable[[], MixturePolicy], folder: Path) -> None:
        """Writes the policy folder; `policy` is called by processes that write something of it."""
        if self.accelerator.is_main_process:
            policy().save_pretrained(folder)


class Whole(AbstractPlacement):
    """Every process holds everything, and what is wrapped around the mixture averages gradients."""

    def share_gradients(self) -> None:
        """Nothing is left to do."""
