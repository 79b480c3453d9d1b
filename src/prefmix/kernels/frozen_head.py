"""Log-probabilities of texts under one frozen output head, with a gradient to the states in the same pass.

Legend: T tokens, N texts, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.kernels.next_token import base_logits
from prefmix.kernels.output_tile import OutputTile
from prefmix.kernels.texts import sum_tokens
from prefmix.kernels.tiles import LN2, Tiles, accumulation_dtype, default_tiles, spans


def frozen_head_log_probs(
    hidden: Float[Tensor, "T D"],
    targets: Int[Tensor, "T"],
    segments: Int[Tensor, "T"],
    num_texts: int,
    base_weight: Float[Tensor, "V D"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    impl: Literal["auto", "chunked", "eager"] = "auto",
    tiles: Tiles | None = None,
) -> Float[Tensor, "N"]:
    """Sequence log-probabilities under a head that does not train.

        log p(text) = sum_t z[y_t] - logsumexp_v z[v],   z = W h + b,   d log p / d h = W[y] - E_p[W]

    The expectation is accumulated beside the softmax, as attention accumulates values, with keys = values = W. So a
    gradient costs two products with the head, where recomputing logits in the backward costs three. Products run in
    the type of `base_weight`, softmax and sums in float32 (float64 where inputs are). With or without a gradient the
    values are equal bit for bit.

    Args:
        hidden: [T, D] final states at the positions that predict the targets.
        targets: [T] token ids, 0..V-1.
        segments: [T] the text of each token, 0..N-1.
        num_texts: N.
        base_weight: [V, D] W, which gets no gradient.
        bias: [V] frozen bias b.
        impl: "chunked" (also "auto") holds two tiles of logits; "eager" materialises [T, V], for tests.
        tiles: size of a tile; by default what was measured best for the device.

    Returns:
        [N] nats.

    Relations: `low_rank_head.head_log_probs` where heads train; this one is for experts that differ in their states.
    """
    tiles = default_tiles(hidden.device) if tiles is None else tiles
    # The product's type is the base's; a trainer's autocast must not change it.
    with torch.autocast(hidden.device.type, enabled=False):
        if impl == "eager":
            log_softmax = base_logits(hidden, base_weight, bias).log_softmax(-1)
            tokens = log_softmax.gather(-1, targets[:, None])[:, 0]
        else:
            tokens = _FrozenHead.apply(hidden, base_weight, bias, targets, tiles)
        return sum_tokens(tokens, segments, num_texts)


class _FrozenHead(torch.autograd.Function):
    """Token log-probabilities [T]; the backward is one multiplication."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, base_weight: Tensor, bias: Tensor | None, targets: Tensor, tiles: Tiles
    ) -> Tensor:
        states = hidden.to(base_weight.dtype)
        dtype = accumulation_dtype(hidden.dtype)
        needs_gradient = ctx.needs_input_grad[0]
        softmax = _softmax(states, base_weight, bias, tiles, dtype, needs_gradient)
        target_rows = base_weight[targets].to(dtype)
        log_probs = torch.linalg.vecdot(states.to(dtype), target_rows)
        if bias is not None:
            log_probs = log_probs + bias[targets].to(dtype)
        if softmax.expected is not None:
            ctx.save_for_backward(target_rows.sub_(softmax.expected).to(hidden.dtype))
        return log_probs.sub_(softmax.lse, alpha=LN2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (direction,) = ctx.saved_tensors
        return direction * grad[:, None].to(direction.dtype), None, None, None, None


class _Softmax(NamedTuple):
    """lse [T] in bits; expected [T, D] = E_p[W], or None where no gradient is wanted."""

    lse: Tensor
    expected: Tensor | None


def _softmax(
    states: Float[Tensor, "T D"],
    base_weight: Float[Tensor, "V D"],
    bias: Float[Tensor, "V"] | None,
    tiles: Tiles,
    dtype: torch.dtype,
    with_expectation: bool,
) -> _Softmax:
    shift = torch.full((len(states),), -torch.inf, dtype=dtype, device=states.device)
    total = torch.zeros_like(shift)
    expected = torch.zeros(states.shape, dtype=dtype, device=states.device) if with_expectation else None
    output = OutputTile.allocate(base_weight, bias, len(states), tiles, dtype)
    for tokens in spans(len(states), tiles.tokens):
        for vocab in spans(len(base_weight), tiles.vocab):
            logits, _ = output.logits(states[tokens], vocab)
            new = torch.maximum(shift[tokens], logits.amax(-1))
            decay = torch.exp2(shift[tokens] - new)
            tile = logits.sub_(new[:, None]).exp2_()
            total[tokens] = total[tokens] * decay + tile.sum(-1)
            shift[tokens] = new
            if expected is not None:
                expected[tokens] = _decayed_sum(expected[tokens], decay, tile, base_weight[vocab])
    if expected is not None:
        expected.div_(total[:, None])
    return _Softmax(shift.add_(total.log2_()), expected)


def _decayed_sum(
    expected: Float[Tensor, "C D"], decay: Float[Tensor, "C"], tile: Float[Tensor, "C S"], rows: Float[Tensor, "S D"]
) -> Float[Tensor, "C D"]:
    """The old sum times decay, plus tile W; the product in the type of W."""
    expected = expected.mul_(decay[:, None])
    if rows.dtype == tile.dtype:
        return expected.addmm_(tile, rows)
    return expected.add_(tile.to(rows.dtype) @ rows)
