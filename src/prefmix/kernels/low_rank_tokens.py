"""Token log-probabilities under K low-rank heads with autograd, for implementations that read base logits by tiles.

Base logits are computed once where they fit the budget of `Tiles.kept_bytes`; for the tokens beyond it the backward
computes them again, once for all experts.

Legend: T tokens, K experts, D hidden, V vocabulary, r rank, R = K + 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.kernels.logit_plane import LogitPlane
from prefmix.kernels.low_rank_problem import Gradients, Passes, Problem, TokenLogProbs, add_targets, target_logits
from prefmix.kernels.sparsity import at_rows, rows_with_gradient
from prefmix.kernels.tiles import LN2, Tiles


def tiled_token_log_probs(
    problem: Problem, hidden: Float[Tensor, "T D"], tiles: Tiles, passes: Passes
) -> TokenLogProbs:
    """Log-probabilities of targets; gradients flow to `hidden`, `problem.low` and `problem.up`.

    Args:
        problem: inputs; `states` is `hidden` in the type of the base head.
        hidden: [T, D].
        tiles: size of a tile and what may be kept.
        passes: an implementation.
    """
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, problem.low, problem.up))
    kept = kept_tokens(problem, tiles) if trains else 0
    if kept in (0, len(hidden)):
        return TokenLogProbs(*_LowRankHead.apply(hidden, *problem, tiles, passes, kept > 0))
    parts = [(slice(0, kept), True), (slice(kept, None), False)]
    done = [_LowRankHead.apply(hidden[part], *problem.rows(part), tiles, passes, keep) for part, keep in parts]
    return TokenLogProbs(*(torch.cat(pieces) for pieces in zip(*done, strict=True)))


def kept_tokens(problem: Problem, tiles: Tiles) -> int:
    """How many tokens' base logits fit the budget."""
    row = len(problem.base_weight) * problem.base_weight.element_size()
    return min(len(problem.states), tiles.kept_bytes // row)


class Forward(NamedTuple):
    """Attributes:
    log_probs: [R, T] of the targets under the base (row 0) and every expert, nats.
    lse: [R, T] log2 sum_v 2^logit.
    plane: base logits, kept or not.
    """

    log_probs: Tensor
    lse: Tensor
    plane: LogitPlane


def forward(problem: Problem, tiles: Tiles, passes: Passes, keep: bool) -> Forward:
    """Log-probabilities, and what `add_gradients` needs."""
    plane = LogitPlane(problem.base_weight, problem.bias, len(problem.states), tiles, problem.low.dtype, keep)
    lse = passes.log_sum_exp(problem, plane)
    return Forward(target_logits(problem).sub_(lse, alpha=LN2), lse, plane)


def add_gradients(
    grads: Gradients,
    grad: Float[Tensor, "K T"],
    problem: Problem,
    lse: Float[Tensor, "R T"],
    plane: LogitPlane,
    passes: Passes,
) -> None:
    """Adds sum_kt grad_kt d log p_kt to the accumulators."""
    passes.subtract_expectations(grads, grad, problem, lse, plane)
    add_targets(grads, grad, problem)


class _LowRankHead(torch.autograd.Function):
    """Token log-probabilities under K heads and the base."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        states: Tensor,
        low: Tensor,
        up: Tensor,
        base_weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tiles: Tiles,
        passes: Passes,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        problem = Problem(states, low, up, base_weight, bias, targets)
        log_probs, lse, plane = forward(problem, tiles, passes, keep)
        base_log_probs = log_probs[0].clone()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*problem, lse)
            ctx.plane, ctx.tiles, ctx.passes, ctx.hidden_dtype = plane if keep else None, tiles, passes, hidden.dtype
        ctx.mark_non_differentiable(base_log_probs)
        return log_probs[1:].T, base_log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, lse = ctx.saved_tensors
        problem, num_tokens = Problem(*inputs), len(grad)
        plane, read, grad = ctx.plane, None, grad.T.contiguous()
        if plane is None:
            # Tokens that no expert learns from need no base logits either.
            read = rows_with_gradient(grad.T)
            if read is not None:
                problem, lse, grad = problem.rows(read), lse[:, read], grad[:, read]
            plane = LogitPlane(problem.base_weight, problem.bias, grad.shape[1], ctx.tiles, lse.dtype, keep=False)
        needs_hidden, _, needs_low, needs_up = ctx.needs_input_grad[:4]
        grads = Gradients.zeros(problem, needs_hidden, needs_low, needs_up)
        add_gradients(grads, grad, problem, lse, plane, ctx.passes)
        grad_hidden = None if grads.hidden is None else at_rows(grads.hidden, read, num_tokens, dim=0)
        grad_low = None if grads.low is None else at_rows(grads.low, read, num_tokens, dim=1)
        grad_up = None if grads.up is None else grads.up.transpose(1, 2)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(ctx.hidden_dtype)
        return grad_hidden, None, grad_low, grad_up, *[None] * 6
