"""What may train below the experts: nothing, one LoRA that all experts share, or the blocks themselves.

The reference is the base model as it was, so none of the three changes the base: LoRA is switched on for the experts'
pass only, and blocks that train are a copy.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefmix.experts.blocks import TopBlocks, find_blocks, linear_layers
from prefmix.experts.flat_attention import recompute_contexts
from prefmix.experts.lora import LoraBank


class AbstractTrunk(nn.Module, ABC):
    """The model below the branch point as the experts see it.

    Attributes:
        trains: whether anything in it does.
    """

    trains: bool
    _recomputes = False

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The model to run, inside `applied`."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this block `model` is the trunk of the experts."""
        blocks = find_blocks(self.model) if self._recomputes and torch.is_grad_enabled() else ()
        for block in blocks:
            block.training = True  # its own flag: transformers' blocks recompute in training, and layers keep theirs
        try:
            with self._updated():
                yield
        finally:
            for block in blocks:
                block.training = False

    def recompute(self) -> None:
        """From now on keeps what goes into each block, and runs the block again when the backward reaches it."""
        if self.trains:
            self._recomputes = True
            self.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": self._contexts})

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """A block that runs again sees the update and the row of texts that it saw at first."""
        return nullcontext(), _both(self._updated(), recompute_contexts()[1])

    def _updated(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Trained tensors by name; empty where none train."""
        return {}

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Where `load_state` writes."""
        return {}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave.

        Raises:
            ValueError: other names or shapes.
        """
        own = self.parameters_by_name()
        found = {name: tuple(value.shape) for name, value in state.items()}
        expected = {name: tuple(value.shape) for name, value in own.items()}
        if found != expected:
            differing = sorted(set(found.items()) ^ set(expected.items()))
            raise ValueError(
                f"trained trunk: {len(differing)} tensors differ in name or shape, the first is {differing[0]}; use "
                "the trunk, branch_depth, expert_rank and base model that it was trained with"
            )
        for name, value in state.items():
            own[name].copy_(value)


class FrozenTrunk(AbstractTrunk):
    """The base itself: its pass is the reference too, where the experts branch off above it."""

    trains = False

    def __init__(self, base_model: PreTrainedModel, depth: int, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self._model = (base_model,)  # in a tuple, so that the base is not registered twice

    @property
    def model(self) -> PreTrainedModel:
        return self._model[0]


class LoraTrunk(AbstractTrunk):
    """One LoRA on every linear layer below the branch point, shared by all experts.

    Attributes:
        update: the LoRA, a bank of one.
    """

    trains = True

    def __init__(self, base_model: PreTrainedModel, depth: int, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self._model = (base_model,)
        layers = linear_layers(base_model, _blocks_below(base_model, depth))
        self.update = LoraBank(layers, 1, rank, alpha, generator)

    @property
    def model(self) -> PreTrainedModel:
        return self._model[0]

    def _updated(self) -> AbstractContextManager[None]:
        return self.update.applied(self.update.unbind()[0])

    def state(self) -> dict[str, Tensor]:
        return self.update.state(0)

    def parameters_by_name(self) -> dict[str, Tensor]:
        return {name: parameter[0] for name, parameter in self.update.stacks().items()}


class FullTrunk(AbstractTrunk):
    """A copy of everything below the branch point, whose parameters train.

    The final norm belongs to the trunk where experts are heads alone. Embeddings that are tied to the output head stay
    frozen with it. Tensors that do not train are shared with the base, not copied.
    """

    trains = True

    def __init__(self, base_model: PreTrainedModel, depth: int, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        above: list[nn.Module] = [base_model.get_output_embeddings()]
        if depth:
            top = TopBlocks(base_model, depth)
            above += [*top.blocks, *top.norms]
        kept = {id(parameter) for module in above for parameter in module.parameters()}
        decoder = {id(parameter) for parameter in base_model.get_decoder().parameters()}
        shared = {id(p): p for p in base_model.parameters() if id(p) in kept or id(p) not in decoder}
        self.copy: PreTrainedModel = copy.deepcopy(base_model, dict(shared))
        for parameter in self.copy.parameters():
            parameter.requires_grad_(id(parameter) not in shared)

    @property
    def model(self) -> PreTrainedModel:
        return self.copy

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters_by_name().items()}

    def parameters_by_name(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.copy.named_parameters() if parameter.requires_grad}


TRUNKS: dict[str, type[FrozenTrunk] | type[LoraTrunk] | type[FullTrunk]] = {
    "frozen": FrozenTrunk,
    "lora": LoraTrunk,
    "full": FullTrunk,
}


@contextmanager
def _both(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    with outer, inner:
        yield


def _blocks_below(base_model: PreTrainedModel, depth: int) -> tuple[nn.Module, ...]:
    blocks = find_blocks(base_model)
    if depth >= len(blocks):
        raise ValueError(
            f"trunk='lora' with branch_depth={depth}: all {len(blocks)} blocks belong to the experts, so there is no "
            "trunk to train; use trunk='frozen' or a smaller branch_depth"
        )
    return blocks[: len(blocks) - depth]
