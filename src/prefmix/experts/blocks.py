"""The blocks of a decoder, and how the last n of them are run again from the state that entered them.

Whatever a block reads beside its state (masks, positions, caches) is recorded while the model itself calls it, so
nothing here knows an architecture; that a replay gives the model's own states is checked when it is built.

Legend: N texts, L positions, D hidden, n blocks above the branch point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefmix.experts.lora import is_linear
from prefmix.experts.reading import Kept
from prefmix.experts.trunk import run_trunk


class Call(NamedTuple):
    """What a block was called with beside its state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BranchPoint(NamedTuple):
    """Where the experts leave the trunk.

    Attributes:
        hidden: [N, L, D] the state that enters the last n blocks.
        calls: n calls, one for each of these blocks.
        output: [N, L, D] what the model's own blocks made of it, before the final norm; `hidden` itself if they were
            left out.
    """

    hidden: Float[Tensor, "N L D"]
    calls: list[Call]
    output: Float[Tensor, "N L D"]

    def select(self, kept: Kept) -> BranchPoint:
        """The branch point of some of the texts.

        Whatever has the rows along its first of several axes (masks, rotary tables), or the one row's tokens along its
        second, is taken to belong to them.
        """
        select = partial(_of_texts, kept=kept)
        calls = [Call(select(call.args), select(call.kwargs)) for call in self.calls]
        return BranchPoint(select(self.hidden), calls, select(self.output))


class TopBlocks:
    """The last n blocks of a decoder and its final norm.

    Attributes:
        blocks: the n blocks, from the lowest.
        norms: what the decoder applies after the last block.
    """

    def __init__(self, model: PreTrainedModel, depth: int) -> None:
        """Finds the blocks and checks a replay on a few tokens.

        Raises:
            ValueError: the decoder has no list of blocks, fewer than `depth` of them, or a replay differs.
        """
        every = find_blocks(model)
        if depth > len(every):
            raise ValueError(
                f"branch_depth={depth}: the model has {len(every)} blocks; use at most that, or -1 for all"
            )
        self._model = model
        self.blocks = every[len(every) - depth :]
        self._returns_tuple = False
        self.norms: tuple[nn.Module, ...] = _modules_after(model, every)
        self._check()

    def run_trunk(
        self, input_ids: Int[Tensor, "N M"], attention_mask: Int[Tensor, "N L"], *, through: bool, **options: Any
    ) -> BranchPoint:
        """Runs the model and stops at the branch point.

        Args:
            input_ids: see `trunk.run_trunk`.
            attention_mask: the same.
            through: whether the model's own last n blocks run too (the reference), or are passed over.
            options: of the trunk, such as a cache.
        """
        calls: list[tuple[Tensor, Call]] = []
        outputs: list[Tensor] = []
        with self._recording(calls, outputs, through):
            run_trunk(self._model, input_ids, attention_mask, **options)
        return BranchPoint(calls[0][0], [call for _, call in calls], outputs[-1])

    def replay(self, point: BranchPoint, replace: tuple[Any, Any] | None = None) -> Float[Tensor, "N L D"]:
        """Runs the last n blocks from the branch point, before the final norm.

        Args:
            point: where to start.
            replace: an argument of the recorded calls, and what stands for it (the cache of another expert).
        """
        hidden = point.hidden
        for block, call in zip(self.blocks, point.calls, strict=True):
            args, kwargs = call if replace is None else _replaced(call, *replace)
            if "hidden_states" in kwargs:
                hidden = _state_of(block(*args, **(kwargs | {"hidden_states": hidden})))
            else:
                hidden = _state_of(block(hidden, *args, **kwargs))
        return hidden

    def norm(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The decoder's final norm."""
        for norm in self.norms:
            hidden = norm(hidden)
        return hidden

    @contextmanager
    def _recording(self, calls: list[tuple[Tensor, Call]], outputs: list[Tensor], through: bool) -> Iterator[None]:
        """Puts a recorder before (or in place of) each of the last n blocks; not for two threads at once."""
        before = [block.__dict__.get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = partial(self._record, calls, outputs, block.forward if through else None)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _record(
        self, calls: list[tuple[Tensor, Call]], outputs: list[Tensor], forward: Any, *args: Any, **kwargs: Any
    ) -> Any:
        hidden, rest = (kwargs["hidden_states"], args) if "hidden_states" in kwargs else (args[0], args[1:])
        calls.append((hidden, Call(rest, kwargs)))
        if forward is None:
            outputs.append(hidden)
            return (hidden,) if self._returns_tuple else hidden
        output = forward(*args, **kwargs)
        self._returns_tuple = isinstance(output, tuple)
        outputs.append(_state_of(output))
        return output

    @torch.no_grad()
    def _check(self) -> None:
        tokens = torch.arange(4, device=self._model.get_output_embeddings().weight.device)[None]
        mask = torch.ones_like(tokens)
        expected = run_trunk(self._model, tokens, mask, use_cache=False).last_hidden_state[0]
        try:
            point = self.run_trunk(tokens, mask, through=True, use_cache=False)
            found = self.norm(self.replay(point)[0])
            passed_over = self.run_trunk(tokens, mask, through=False, use_cache=False)
            same = len(point.calls) == len(self.blocks) and torch.equal(point.hidden, passed_over.hidden)
        except (TypeError, KeyError, IndexError, RuntimeError) as error:
            raise ValueError(_refusal(self._model, f"running its last blocks alone fails ({error})")) from error
        if not same or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
            raise ValueError(_refusal(self._model, "its last blocks, run alone, do not give its last state"))


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The decoder's blocks, from the lowest.

    Raises:
        ValueError: no list of as many modules as the config has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise ValueError(_refusal(model, f"it has no single list of num_hidden_layers={count} blocks"))
    return tuple(lists[0])


def linear_layers(model: PreTrainedModel, parts: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Every linear layer inside `parts` but the output head, by its name in `model`, in the model's order."""
    inside = {id(module) for part in parts for module in part.modules()} - {id(model.get_output_embeddings())}
    found = {name: module for name, module in model.named_modules() if id(module) in inside and is_linear(module)}
    if not found:
        raise ValueError(f"{type(model).__name__}: no linear layer that LoRA could change; use branch_depth=0")
    return found


def _modules_after(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """Children of the decoder that run after its last block, in order: the final norm, in some models a projection."""
    order: list[nn.Module] = []
    children = [m for m in model.get_decoder().children() if not isinstance(m, nn.ModuleList)]
    handles = [
        module.register_forward_hook(lambda module, *_: order.append(module)) for module in (*children, blocks[-1])
    ]
    tokens = torch.arange(4, device=model.get_output_embeddings().weight.device)[None]
    try:
        with torch.no_grad():
            run_trunk(model, tokens, torch.ones_like(tokens), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(order[order.index(blocks[-1]) + 1 :])


def _of_texts(value: Any, kept: Kept) -> Any:
    if isinstance(value, Tensor):
        belongs = value.dim() > 1 and value.shape[kept.axis] == kept.size and (kept.axis == 0 or len(value) == 1)
        return value.index_select(kept.axis, kept.places) if belongs else value
    if isinstance(value, tuple | list):
        return type(value)(_of_texts(item, kept) for item in value)
    if isinstance(value, dict):
        return {name: _of_texts(item, kept) for name, item in value.items()}
    return value


def _replaced(call: Call, old: Any, new: Any) -> Call:
    args = tuple(new if value is old else value for value in call.args)
    return Call(args, {name: new if value is old else value for name, value in call.kwargs.items()})


def _state_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _refusal(model: PreTrainedModel, reason: str) -> str:
    return f"{type(model).__name__}: {reason}; use branch_depth=-1 (LoRA in all blocks) or branch_depth=0 (heads only)"
