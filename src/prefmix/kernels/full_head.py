"""Log-probabilities of texts under K full output heads over one frozen trunk, logits never stored.

Legend: T tokens, N texts, K experts, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.kernels.output_tile import OutputTile
from prefmix.kernels.sparsity import rows_with_gradient
from prefmix.kernels.texts import HeadLogProbs, sum_by_text
from prefmix.kernels.tiles import LN2, Tiles, accumulation_dtype, default_tiles, spans


def full_head_log_probs(
    hidden: Float[Tensor, "T D"],
    targets: Int[Tensor, "T"],
    segments: Int[Tensor, "T"],
    num_texts: int,
    base_weight: Float[Tensor, "V D"],
    weights: Float[Tensor, "K V D"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    impl: Literal["auto", "chunked", "eager"] = "auto",
    tiles: Tiles | None = None,
) -> HeadLogProbs:
    """Sequence log-probabilities of K full heads and of the base head.

        log p_k(text) = sum_t logits_k[y_t] - logsumexp_v logits_k[v],    logits_k = W_k h + b

    Products run in the type of `base_weight`, softmax and sums in float32 (float64 where inputs are). Gradients flow
    to `weights` and, where it requires one, `hidden`; not to the frozen base, and not through `base_log_probs`. With
    W_k = W the experts equal the base bit for bit.

    Args:
        hidden: [T, D] final states at the positions that predict the targets.
        targets: [T] token ids, 0..V-1.
        segments: [T] the text of each token, 0..N-1.
        num_texts: N.
        base_weight: [V, D] the frozen head W of the reference.
        weights: [K, V, D] W_k.
        bias: [V] frozen bias b, shared by all heads.
        impl: "chunked" (also "auto") holds two tiles of logits; "eager" materialises [K, T, V], for tests.
        tiles: size of a tile; by default what was measured best for the device.

    Returns:
        `HeadLogProbs` in nats.

    Relations: costs K + 1 output products forward and 2 K backward; `low_rank_head.head_log_probs` shares one.
    """
    tiles = default_tiles(hidden.device) if tiles is None else tiles
    # The product's type is the base's; a trainer's autocast must not change it.
    with torch.autocast(hidden.device.type, enabled=False):
        if impl == "eager":
            tokens = _eager(hidden, weights, base_weight, bias, targets)
        else:
            tokens = _FullHead.apply(hidden, weights, base_weight, bias, targets, tiles)
        return sum_by_text(*tokens, segments, num_texts)


class _TokenLogProbs(NamedTuple):
    experts: Float[Tensor, "T K"]
    base: Float[Tensor, "T"]


def _eager(
    hidden: Float[Tensor, "T D"],
    weights: Float[Tensor, "K V D"],
    base_weight: Float[Tensor, "V D"],
    bias: Float[Tensor, "V"] | None,
    targets: Int[Tensor, "T"],
) -> _TokenLogProbs:
    states = hidden.to(base_weight.dtype)
    heads = torch.cat([base_weight[None], weights.to(base_weight.dtype)])
    logits = torch.einsum("td,kvd->ktv", states, heads).to(accumulation_dtype(hidden.dtype))
    logits = logits if bias is None else logits + bias.to(logits.dtype)
    index = targets[None, :, None].expand(len(heads), -1, 1)
    log_probs = logits.log_softmax(-1).gather(-1, index).squeeze(-1)
    return _TokenLogProbs(log_probs[1:].T, log_probs[0].detach())


class _FullHead(torch.autograd.Function):
    """Token log-probabilities under K full heads; the backward recomputes each head's logits."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        base_weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor]:
        states = hidden.to(base_weight.dtype)
        dtype = accumulation_dtype(torch.promote_types(hidden.dtype, weights.dtype))
        output = OutputTile.allocate(base_weight, bias, len(states), tiles, dtype)
        rows = [_token_log_probs(output, states, head, targets, tiles) for head in (base_weight, *weights)]
        log_probs, lse = torch.stack([row.log_probs for row in rows]), torch.stack([row.lse for row in rows])
        base_log_probs = log_probs[0].clone()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(states, weights, base_weight, bias, targets, lse[1:])
            ctx.tiles, ctx.hidden_dtype = tiles, hidden.dtype
        ctx.mark_non_differentiable(base_log_probs)
        return log_probs[1:].T, base_log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weights, base_weight, bias, targets, lse = ctx.saved_tensors
        needs_hidden, needs_weights = ctx.needs_input_grad[:2]
        tiles, dtype = ctx.tiles, lse.dtype
        grad_hidden = torch.zeros_like(states, dtype=dtype) if needs_hidden else None
        grad_weights = torch.zeros_like(weights, dtype=dtype) if needs_weights else None
        output = OutputTile.allocate(base_weight, bias, len(states), tiles, dtype)
        for k, head in enumerate(weights):
            rows = rows_with_gradient(grad[:, k, None])
            if rows is not None and len(rows) == 0:
                continue  # nothing to learn for this expert
            chosen = slice(None) if rows is None else rows
            part, part_targets, target_grad = states[chosen], targets[chosen], grad[chosen, k, None]
            part_hidden = None if grad_hidden is None else torch.zeros_like(part, dtype=dtype)
            grad_head = None if grad_weights is None else grad_weights[k]
            _subtract_expectations(output, part, head, lse[k, chosen], target_grad, part_hidden, grad_head, tiles)
            if grad_head is not None:
                grad_head.index_add_(0, part_targets, part.to(dtype) * target_grad)
            if grad_hidden is not None and part_hidden is not None:
                part_hidden.addcmul_(head[part_targets].to(dtype), target_grad)
                grad_hidden[chosen] += part_hidden
        grad_hidden = None if grad_hidden is None else grad_hidden.to(ctx.hidden_dtype)
        grad_weights = None if grad_weights is None else grad_weights.to(weights.dtype)
        return grad_hidden, grad_weights, None, None, None, None


class _HeadRow(NamedTuple):
    """One head's answer: log_probs [T] in nats, lse [T] in bits."""

    log_probs: Tensor
    lse: Tensor


def _token_log_probs(output: OutputTile, states: Tensor, head: Tensor, targets: Tensor, tiles: Tiles) -> _HeadRow:
    dtype = output.logits_buffer.dtype
    shift = torch.full((len(states),), -torch.inf, dtype=dtype, device=states.device)
    total = torch.zeros_like(shift)
    for tokens in spans(len(states), tiles.tokens):
        for vocab in spans(len(head), tiles.vocab):
            logits, _ = output.logits(states[tokens], vocab, head)
            new = torch.maximum(shift[tokens], logits.amax(-1))
            tile_total = logits.sub_(new[:, None]).exp2_().sum(-1)
            total[tokens] = total[tokens] * torch.exp2(shift[tokens] - new) + tile_total
            shift[tokens] = new
    lse = shift.add_(total.log2_())
    target = torch.linalg.vecdot(states.to(dtype), head[targets].to(states.dtype).to(dtype))
    if output.bias is not None:
        target = target + output.bias[targets].to(dtype)
    return _HeadRow(target.sub_(lse, alpha=LN2), lse)


def _subtract_expectations(
    output: OutputTile,
    states: Float[Tensor, "T D"],
    head: Float[Tensor, "V D"],
    lse: Float[Tensor, "T"],
    grad: Float[Tensor, "T 1"],
    grad_hidden: Float[Tensor, "T D"] | None,
    grad_head: Float[Tensor, "V D"] | None,
    tiles: Tiles,
) -> None:
    """Adds -g E[W] to the states' gradient and -g p h^T to the head's."""
    for tokens in spans(len(states), tiles.tokens):
        for vocab in spans(len(head), tiles.vocab):
            logits, _ = output.logits(states[tokens], vocab, head)
            weighted = logits.sub_(lse[tokens, None]).exp2_().mul_(grad[tokens])
            if grad_head is not None:
                grad_head[vocab].addmm_(weighted.T, states[tokens].to(weighted.dtype), alpha=-1)
            if grad_hidden is not None:
                grad_hidden[tokens].addmm_(weighted, head[vocab].to(weighted.dtype), alpha=-1)
