"""K low-rank updates (LoRA) of each of several linear layers, of which one expert's is switched on at a time.

    layer_k(x) = layer(x) + s B_k A_k x,    s = alpha / r

The arithmetic, the start (B = 0, A uniform) and the names on disk are PEFT's, so an expert's update is a PEFT adapter.
The layers themselves are not touched: an update exists only inside `LoraBank.applied`.

Legend: K experts, r rank, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class LoraMatrices(NamedTuple):
    """One expert's update of one layer.

    Attributes:
        down: [r, I] A.
        up: [O, r] B.
    """

    down: Float[Tensor, "r I"]
    up: Float[Tensor, "O r"]


class LoraBank(nn.Module):
    """K updates of each of some linear layers, stacked along a leading axis of length K.

    Attributes:
        down: for each layer [K, r, I] A, uniform in +-1/sqrt(I), different for every expert.
        up: for each layer [K, O, r] B, zeros: every expert starts as the layer itself, exactly.
        scale: s.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], num_experts: int, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        """Makes untrained updates, in float32 whatever the layers' type.

        Args:
            layers: linear layers by their name in the model; they are not registered as parts of this module.
            num_experts: K.
            rank: r.
            alpha: numerator of the scale.
            generator: CPU generator of A.
        """
        super().__init__()
        self.names = tuple(layers)
        self._layers = tuple(layers.values())
        self.num_experts, self.rank, self.alpha, self.scale = num_experts, rank, alpha, alpha / rank
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in layers.items():
            inputs, outputs = _sizes(layer)
            device = next(layer.parameters()).device
            # Drawn on the CPU, so that a seed means the same start on every device.
            values = (2 * torch.rand(num_experts, rank, inputs, generator=generator) - 1) / inputs**0.5
            self.down[_key(name)] = nn.Parameter(values.to(device))
            self.up[_key(name)] = nn.Parameter(torch.zeros(num_experts, outputs, rank, device=device))

    def unbind(self) -> list[list[LoraMatrices]]:
        """For each expert the matrices of each layer, once a forward pass.

        The backward of `unbind` writes each stacked gradient once; indexing by expert would write it K times.
        """
        pairs = [(self.down[_key(name)].unbind(0), self.up[_key(name)].unbind(0)) for name in self.names]
        return [[LoraMatrices(down[k], up[k]) for down, up in pairs] for k in range(self.num_experts)]

    @contextmanager
    def applied(self, matrices: Sequence[LoraMatrices]) -> Iterator[None]:
        """Within this block the layers add one expert's update; not for two threads at once."""
        before = [layer.__dict__.get("forward") for layer in self._layers]
        for layer, own, pair in zip(self._layers, before, matrices, strict=True):
            plain = own is None and type(layer) in (nn.Linear, Conv1D)
            layer.forward = partial(_updated, layer if plain else None, layer.forward, pair, self.scale)
        try:
            yield
        finally:
            for layer, own in zip(self._layers, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own

    def state(self, expert: int) -> dict[str, Tensor]:
        """One expert's matrices as PEFT names them: `<layer>.lora_A.weight` [r, I], `<layer>.lora_B.weight` [O, r]."""
        return {name: parameter[expert].detach().clone() for name, parameter in self.stacks().items()}

    @torch.no_grad()
    def load_state(self, expert: int, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave; names and shapes were checked (`shapes`)."""
        for name, parameter in self.stacks().items():
            parameter[expert].copy_(state[name])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of `state`."""
        return {name: tuple(parameter.shape[1:]) for name, parameter in self.stacks().items()}

    def stacks(self) -> dict[str, nn.Parameter]:
        """The stacked parameters under the names of `state`."""
        found = {}
        for name in self.names:
            found[f"{name}.lora_A.weight"] = self.down[_key(name)]
            found[f"{name}.lora_B.weight"] = self.up[_key(name)]
        return found


def is_linear(layer: nn.Module) -> bool:
    """Whether LoRA knows this layer: `nn.Linear` (8- and 4-bit ones too) or GPT-2's `Conv1D`."""
    return isinstance(layer, nn.Linear | Conv1D)


def _updated(layer: nn.Module | None, forward: Callable[[Tensor], Tensor], *args: Any) -> Tensor:
    """What stands for the layer's own `forward`; `layer` is None where that is not a plain product."""
    matrices, scale, inputs = args
    if layer is not None and _is_one_type(layer, inputs, matrices):
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        return _LoraLinear.apply(inputs, weight, layer.bias, *matrices, scale)  # type: ignore[no-any-return]
    output = forward(inputs)
    low = nn.functional.linear(inputs.to(matrices.down.dtype), matrices.down) * scale
    return output + nn.functional.linear(low, matrices.up).to(output.dtype)


def _is_one_type(layer: nn.Module, inputs: Tensor, matrices: LoraMatrices) -> bool:
    parameters = list(layer.parameters(recurse=False))
    one_type = all(tensor.dtype == inputs.dtype for tensor in (*parameters, matrices.down))
    trains = any(parameter.requires_grad for parameter in parameters)
    return one_type and not trains and not torch.is_autocast_enabled(inputs.device.type)


class _LoraLinear(torch.autograd.Function):
    """y = W x + b + s B A x in as few passes over tensors of the outputs' size as there are.

    Autograd would copy the output to add the update, and the gradient of x once more.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = inputs.flatten(0, -2)
        low = rows @ down.T
        outputs = nn.functional.linear(rows, weight, bias).addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(inputs, low, weight, down, up)
        ctx.scale = scale
        return outputs.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, low, weight, down, up = ctx.saved_tensors
        rows, grad_rows = inputs.flatten(0, -2), grad.flatten(0, -2)
        grad_low = (grad_rows @ up).mul_(ctx.scale)
        grad_down = grad_low.T @ rows if ctx.needs_input_grad[3] else None
        # [r, O] and turned: a product with few rows is faster than one with few columns.
        grad_up = (low.T @ grad_rows).mul_(ctx.scale).T if ctx.needs_input_grad[4] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, grad_down, grad_up, None
        grad_inputs = (grad_rows @ weight).addmm_(grad_low, down)
        return grad_inputs.view_as(inputs), None, None, grad_down, grad_up, None


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs; a `Conv1D` stores its weight as [inputs, outputs]."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def _key(name: str) -> str:
    # A parameter's own name must not hold dots.
    return name.replace(".", "/")
