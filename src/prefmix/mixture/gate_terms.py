"""Gate terms that others wrote: modules from features to logits, by name.

Legend: B rows, K experts, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn

Reads = Literal["prompt", "metadata"]


class GateTerm(NamedTuple):
    """A term of the gate.

    Attributes:
        reads: whose features it gets: the pooled states of the prompt, standardised, or encoded metadata.
        build: (D, K) -> a module from [B, D] to logits [B, K], zero at its start so that the gate starts uniform.
    """

    reads: Reads
    build: Callable[[int, int], nn.Module]


GATE_TERMS: dict[str, GateTerm] = {}


def build_term(name: str, num_features: int, num_experts: int) -> nn.Module:
    """An untrained term.

    Raises:
        ValueError: its logits do not start at zero, or have another shape.
    """
    module = GATE_TERMS[name].build(num_features, num_experts)
    with torch.no_grad():
        logits = module(torch.ones(2, num_features))
    if tuple(logits.shape) != (2, num_experts) or bool((logits != 0).any()):
        raise ValueError(
            f"gate term {name!r}: build({num_features}, {num_experts}) must give a module from [B, {num_features}] to "
            f"[B, {num_experts}] whose outputs start at zero; set the weight and bias of its last layer to zero"
        )
    return module
