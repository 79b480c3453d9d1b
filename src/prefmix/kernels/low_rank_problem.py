"""What the implementations of K low-rank heads share: inputs after casting, accumulators, and the targets' part.

Legend: T tokens, K experts, D hidden, V vocabulary, r rank, R = K + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.kernels.logit_plane import LogitPlane


class TokenLogProbs(NamedTuple):
    """Attributes:
    experts: [T, K] log p_k(y_t), nats.
    base: [T] the same under the base head; carries no gradient.
    """

    experts: Float[Tensor, "T K"]
    base: Float[Tensor, "T"]


class Demand(NamedTuple):
    """What an implementation must be able to do.

    Attributes:
        device: where the tensors lie.
        dtype: in which softmax and sums run.
        base_dtype: of the base head, in which its product runs.
        rank: r.
    """

    device: torch.device
    dtype: torch.dtype
    base_dtype: torch.dtype
    rank: int


class Problem(NamedTuple):
    """Inputs of a kernel after casting.

    Attributes:
        states: [T, D] hidden in the type of the base head.
        low: [K, T, r] A_k h, float32 or float64 like every tensor below but the base.
        up: [K, V, r] B_k.
        base_weight: [V, D] W.
        bias: [V] b, or None.
        targets: [T].
    """

    states: Tensor
    low: Tensor
    up: Tensor
    base_weight: Tensor
    bias: Tensor | None
    targets: Tensor

    def rows(self, chosen: Any) -> Problem:
        """The same problem for some of the tokens."""
        return self._replace(states=self.states[chosen], low=self.low[:, chosen], targets=self.targets[chosen])


class Gradients(NamedTuple):
    """Accumulators; None where no gradient is asked for.

    Attributes:
        hidden: [T, D] sum_k g_k (W[y] - E_k[W]), the part through the base logits.
        low: [K, T, r] g_k (B_k[y] - E_k[B_k]).
        up: [K, r, V] sum_t g_kt low_kt (onehot(y_t) - p_kt)^T. Vocabulary last: products with a tile then write rows,
            twice as fast as [V, r] columns.
    """

    hidden: Tensor | None
    low: Tensor | None
    up: Tensor | None

    @classmethod
    def zeros(cls, problem: Problem, hidden: bool, low: bool, up: bool) -> Gradients:
        """Accumulators for the gradients asked for."""
        num_experts, vocab, rank = problem.up.shape
        return cls(
            hidden=torch.zeros_like(problem.states, dtype=problem.low.dtype) if hidden else None,
            low=torch.zeros_like(problem.low, memory_format=torch.contiguous_format) if low else None,
            up=problem.up.new_zeros(num_experts, rank, vocab) if up else None,
        )


class Passes(NamedTuple):
    """An implementation: its two passes over the tiles of base logits.

    Attributes:
        log_sum_exp: (problem, plane) -> [R, T] log2 sum_v 2^logit of the base (row 0) and of every expert.
        subtract_expectations: (gradients, grad [K, T], problem, lse [R, T], plane) adds the -g p half of every
            gradient.
    """

    log_sum_exp: Callable[[Problem, LogitPlane], Float[Tensor, "R T"]]
    subtract_expectations: Callable[[Gradients, Float[Tensor, "K T"], Problem, Float[Tensor, "R T"], LogitPlane], None]


def target_logits(problem: Problem) -> Float[Tensor, "R T"]:
    """Logit of the target, in nats, under the base (row 0) and every expert."""
    states, low, up, base_weight, bias, targets = problem
    base = torch.linalg.vecdot(states.to(low.dtype), base_weight[targets].to(low.dtype))
    if bias is not None:
        base = base + bias[targets].to(low.dtype)
    return torch.cat([base[None], base + torch.linalg.vecdot(low, up[:, targets])])


def add_targets(grads: Gradients, grad: Float[Tensor, "K T"], problem: Problem) -> None:
    """The +g onehot(y) half of every gradient."""
    low, targets = problem.low, problem.targets
    if grads.low is not None:
        grads.low.add_(problem.up[:, targets] * grad[:, :, None])
    if grads.up is not None:
        grads.up.index_add_(2, targets, (low * grad[:, :, None]).transpose(1, 2))
    if grads.hidden is not None:
        grads.hidden.addcmul_(problem.base_weight[targets].to(low.dtype), grad.sum(0)[:, None])
