"""A gate for one expert more or one expert fewer, with weights renormalised.

    narrowed:  w'_j(x, u) = w_j(x, u) / (1 - w_k(x, u))            exactly, for every prompt, user and metadata
    widened:   w'_K = w, w'_k = (1 - w) w_k                        exactly where the gate is global, at the average
               prompt and metadata, and for every user of the `user` term; elsewhere to first order

The weight of a new expert cannot stay constant where a gate is linear in its features: log-sum-exp of the old logits is
not linear. The new column is the mean of the old ones under their weights at the average prompt and metadata, which has
the log-sum-exp's own derivative there. Legend: K experts, U users, P and M features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.gates import Gate

_LINEAR = ("prompt", "metadata")
_FIXED = ("prompt_mean", "prompt_scale")


@torch.no_grad()
def widened(gate: Gate, weight: float) -> Gate:
    """The gate with an expert more, the last; a gate without a `global` term gets one to hold the weight.

    Args:
        gate: K experts; not changed.
        weight: w, above 0 and below 1.

    Raises:
        ValueError: a weight outside of (0, 1), or a gate of continuous groups.
    """
    if not 0 < weight < 1:
        raise ValueError(f"weight={weight}: the new expert's share of the mixture, above 0 and below 1")
    linear = [name for name in _LINEAR if name in gate.terms]
    biases = {name: getattr(gate, name).bias.double() for name in linear}
    neutral = gate.population_log_weights().double() + sum(biases.values(), gate.population_log_weights().new_zeros(()))
    average = torch.softmax(neutral, dim=0)
    state = _start(gate)
    for name in linear:
        layer = getattr(gate, name)
        state[f"{name}.weight"] = torch.cat([layer.weight, (average.to(layer.weight) @ layer.weight)[None]])
        state[f"{name}.bias"] = torch.cat([layer.bias, (average.to(layer.bias) @ layer.bias)[None]])
    new = torch.logsumexp(neutral, 0) + _log_odds(weight) - sum(average @ bias for bias in biases.values())
    logits = torch.cat([gate.population_log_weights().double(), new[None]])
    if "user" in gate.terms:
        # The new expert's offset moves with the user's log-sum-exp, so that each user gives it the same share.
        offset = torch.logsumexp(neutral + gate.user.double(), dim=1) - torch.logsumexp(neutral, dim=0)
        state["user"] = torch.cat([gate.user, offset[:, None].to(gate.user)], dim=1)
    return _rebuilt(gate, gate.num_experts + 1, logits, state)


@torch.no_grad()
def narrowed(gate: Gate, expert: int) -> Gate:
    """The gate without expert k.

    Args:
        gate: K experts, two or more; not changed.
        expert: k.

    Raises:
        ValueError: a gate of continuous groups.
    """
    kept = _others(gate.num_experts, expert).to(gate.population_log_weights().device)
    state = _start(gate)
    for name in _LINEAR:
        if name in gate.terms:
            layer = getattr(gate, name)
            state[f"{name}.weight"], state[f"{name}.bias"] = layer.weight[kept], layer.bias[kept]
    if "user" in gate.terms:
        state["user"] = gate.user[:, kept]
    return _rebuilt(gate, len(kept), gate.population_log_weights().double()[kept], state)


def _others(num_experts: int, expert: int) -> Int[Tensor, "K_1"]:
    assert 0 <= expert < num_experts and num_experts > 1
    return torch.tensor([k for k in range(num_experts) if k != expert])


def _start(gate: Gate) -> dict[str, Tensor]:
    if gate.further:
        raise ValueError(
            f"gate term {next(iter(gate.further))!r}: nothing says how a module of your own gains or loses an expert; "
            "train again with another num_experts"
        )
    if gate.membership is not None:
        raise ValueError(
            "latent='membership': the weights of users lie in a space made for these experts; train again with another "
            "num_experts, or use latent='user'"
        )
    return {name: value for name, value in gate.state_dict().items() if name in _FIXED}


def _rebuilt(gate: Gate, num_experts: int, logits: Float[Tensor, "K_new"], state: dict[str, Tensor]) -> Gate:
    description: dict[str, Any] = gate.describe() | {"num_experts": num_experts}
    if "global" not in gate.terms:
        description["terms"] = ["global", *gate.terms]
    new = Gate(**description).to(gate.population_log_weights().device)
    log_weights = torch.log_softmax(logits, dim=0).float()
    name = "global_log_weights" if "global_log_weights" in dict(new.named_buffers()) else "global_logits"
    new.load_state_dict(state | {name: log_weights})
    return new.train(gate.training)


def _log_odds(weight: float) -> float:
    return math.log(weight) - math.log1p(-weight)
