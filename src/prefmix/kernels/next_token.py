"""Next-token logits of K heads for decoding, where logits are wanted and there are few positions.

Legend: B sequences, K experts, D hidden, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.kernels.tiles import accumulation_dtype


def base_logits(
    hidden: Float[Tensor, "B D"], base_weight: Float[Tensor, "V D"], bias: Float[Tensor, "V"] | None
) -> Float[Tensor, "B V"]:
    """W h + b: the product in the type of W, the result in float32 (float64 where inputs are)."""
    logits = (hidden.to(base_weight.dtype) @ base_weight.T).to(accumulation_dtype(hidden.dtype))
    return logits if bias is None else logits + bias.to(logits.dtype)


def low_rank_logits(
    hidden: Float[Tensor, "B D"],
    base_weight: Float[Tensor, "V D"],
    bias: Float[Tensor, "V"] | None,
    down: Float[Tensor, "K r D"],
    up: Float[Tensor, "K V r"],
) -> Float[Tensor, "B K V"]:
    """W h + b + B_k (A_k h), the arithmetic of `low_rank_head.head_log_probs`; W is read once for all experts."""
    base = base_logits(hidden, base_weight, bias)
    low = torch.einsum("bd,krd->kbr", hidden.to(down.dtype), down)
    return torch.baddbmm(base.to(low.dtype), low, up.transpose(1, 2)).transpose(0, 1)


def full_logits(
    hidden: Float[Tensor, "B D"],
    base_weight: Float[Tensor, "V D"],
    bias: Float[Tensor, "V"] | None,
    weights: Sequence[Float[Tensor, "V D"]],
) -> Float[Tensor, "B K V"]:
    """W_k h + b, in the type of the base head; every expert's head is read."""
    return torch.stack([base_logits(hidden, weight.to(base_weight.dtype), bias) for weight in weights], dim=1)
