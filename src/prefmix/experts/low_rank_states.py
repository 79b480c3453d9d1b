"""States of experts as sets of low-rank pairs: padded to another rank, averaged, perturbed.

An expert's state (`AbstractExperts.expert_state`) holds pairs (down [r, I], up [O, r]) whose product is an update of
one layer, and plain tensors (a whole head). Legend: K experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def pairs(state: State) -> dict[str, str]:
    """Name of each down-projection -> name of its up-projection."""
    found = {}
    for name in state:
        if name.endswith(".lora_A.weight"):
            found[name] = name.removesuffix("lora_A.weight") + "lora_B.weight"
        elif name.split(".")[-1] == "down":
            found[name] = name.removesuffix("down") + "up"
    return found


def rank_of(state: State) -> int:
    """The largest rank among the pairs; 0 where there is none."""
    return max((len(state[down]) for down in pairs(state)), default=0)


def padded(state: State, rank: int, seed: int = 0) -> dict[str, Tensor]:
    """The same updates at a larger rank: exactly the same products, and every new direction can still be trained.

    New rows of a down-projection are drawn at random and new columns of the up-projection are zero: zeros in both would
    have no gradient.

    Args:
        state: an expert's tensors.
        rank: r, at least that of every pair.
        seed: of the new rows.
    """
    generator = torch.Generator().manual_seed(seed)
    result = dict(state)
    for down, up in pairs(state).items():
        missing, inputs = rank - len(state[down]), state[down].shape[1]
        assert missing >= 0, (down, rank)
        rows = torch.randn(missing, inputs, generator=generator) / inputs**0.5
        result[down] = torch.cat([state[down], rows.to(state[down])])
        result[up] = torch.cat([state[up], state[up].new_zeros(len(state[up]), missing)], dim=1)
    return result


def averaged(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of what the states do to each layer: sum_k w_k up_k down_k, exactly, at rank sum_k r_k.

    Means of ups and downs themselves would hold products of one expert's up with another's down.

    Args:
        states: K states with the same names.
        weights: K weights that sum to 1.
    """
    first = states[0]
    partner = pairs(first)
    result = {}
    for down, up in partner.items():
        result[down] = torch.cat([state[down] for state in states])
        result[up] = torch.cat([w * state[up] for w, state in zip(weights, states, strict=True)], dim=1)
    for name in first.keys() - result.keys():
        total = sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
        result[name] = torch.as_tensor(total).to(first[name].dtype)
    return result


def perturbed(state: State, scale: float, seed: int) -> dict[str, Tensor]:
    """Adds normal noise of `scale` times each tensor's root mean square; tensors of integers stay.

    Args:
        state: an expert's tensors.
        scale: relative size of the noise, at least 0.
        seed: equal seeds give equal noise on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, value in state.items():
        if not value.is_floating_point():
            result[name] = value
            continue
        noise = torch.randn(value.shape, generator=generator).to(value)
        result[name] = value + scale * value.float().square().mean().sqrt().to(value) * noise
    return result
