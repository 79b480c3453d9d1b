"""K low-rank heads in pure torch: both passes over a tile of base logits hold it and one more of its size.

Legend: T tokens, n some of them, K experts, D hidden, V vocabulary, S vocabulary entries of a tile, r rank, R = K + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.kernels.logit_plane import LogitPlane
from prefmix.kernels.low_rank_problem import Gradients, Passes, Problem
from prefmix.kernels.sparsity import rows_with_gradient
from prefmix.kernels.tiles import LOG2E

# An expert within so many bits of the base lets it share the base's shift: its largest term is then at least 2^-40,
# and none exceeds 2^40, both far inside float32.
_SAFE_BITS = 40.0


def log_sum_exp(problem: Problem, plane: LogitPlane) -> Float[Tensor, "R T"]:
    """log2 sum_v 2^logit of the base (row 0) and of every expert, by a running maximum over tiles."""
    num_experts, num_tokens = problem.low.shape[:2]
    low_bits = problem.low * LOG2E
    shared_max = _shares_maximum(low_bits, problem.up)
    shift = low_bits.new_full((num_experts + 1, num_tokens), -torch.inf)
    total = torch.zeros_like(shift)
    follows_base = torch.tensor([True, *shared_max], device=shift.device)[:, None]
    for tokens in plane.token_spans():
        for vocab in plane.vocab_spans():
            logits, base, work = plane.bits(problem.states, tokens, vocab)
            old, base_max = shift[:, tokens], torch.maximum(shift[0, tokens], logits.amax(-1))
            new = torch.where(follows_base, base_max, old)
            # Before an expert's first tile old = new = -inf; its total is 0 then.
            total[:, tokens] *= torch.exp2(old - new).nan_to_num_(nan=0.0)
            torch.sub(logits, base_max[:, None], out=base)
            total[0, tokens] += torch.exp2(base, out=work).sum(-1)
            for k, shared in enumerate(shared_max):
                torch.addmm(base, low_bits[k, tokens], problem.up[k, vocab].T, out=work)
                if not shared:
                    new[k + 1] = torch.maximum(old[k + 1], work.amax(-1) + base_max)
                    total[k + 1, tokens] *= torch.exp2(old[k + 1] - new[k + 1])
                    work.sub_((new[k + 1] - base_max)[:, None])
                total[k + 1, tokens] += work.exp2_().sum(-1)
            shift[:, tokens] = new
    return shift.add_(total.log2_())


def _shares_maximum(low_bits: Float[Tensor, "K T r"], up: Float[Tensor, "K V r"]) -> list[bool]:
    """Whether |B_k[v] . low_kt| <= |B_k[v]| |low_kt| is small enough to use the base logits' maximum as the shift."""
    if low_bits.numel() == 0:
        return [True] * len(low_bits)
    # By [r, V] of one expert: a sum that reads memory in order and needs no copy of all.
    largest_up = torch.stack([one.T.square().sum(0).amax().sqrt() for one in up])
    bound = torch.linalg.vector_norm(low_bits, dim=-1).amax(-1) * largest_up
    return (bound <= _SAFE_BITS).tolist()


def subtract_expectations(
    grads: Gradients, grad: Float[Tensor, "K T"], problem: Problem, lse: Float[Tensor, "R T"], plane: LogitPlane
) -> None:
    """The -g p half of every gradient; p is used unnormalised, its scale goes into the small factors."""
    for tokens in plane.token_spans():
        learners = _learners(problem.low[:, tokens], grad[:, tokens], lse[:, tokens])
        if not learners:
            continue
        for vocab in plane.vocab_spans():
            logits, base, work = plane.bits(problem.states, tokens, vocab)
            torch.sub(logits, lse[0, tokens, None], out=base)
            weighted = torch.zeros_like(base) if grads.hidden is not None else None
            for learner in learners:
                up = problem.up[learner.expert, vocab]
                probabilities = learner.probabilities(base, work, up)
                if grads.low is not None:
                    learner.low_grad.addmm_(probabilities, up)
                if grads.up is not None:
                    grads.up[learner.expert, :, vocab].addmm_(learner.weighted_low, probabilities)
                if weighted is not None:
                    learner.add_weighted(weighted, probabilities)
            if grads.hidden is not None and weighted is not None:
                grads.hidden[tokens].addmm_(weighted, plane.weight[vocab].to(weighted.dtype))
        if grads.low is not None:
            for learner in learners:
                rows = slice(None) if learner.rows is None else learner.rows
                grads.low[learner.expert, tokens][rows] = learner.low_grad * learner.coefficient[:, None]


class _Learner(NamedTuple):
    """One expert and those tokens of a tile from which it learns; n of them.

    Attributes:
        expert: k.
        rows: [n] places in the tile; None: all.
        low_bits: [n, r] A_k h in bits.
        shift: [n] lse_k - lse_0 in bits, or None where the expert shares the base's shift.
        coefficient: [n] what the unnormalised probabilities are to be multiplied with.
        weighted_low: [r, n] A_k h times coefficient.
        low_grad: [n, r] sum over tiles of p B_k, without the coefficient.
    """

    expert: int
    rows: Tensor | None
    low_bits: Tensor
    shift: Tensor | None
    coefficient: Tensor
    weighted_low: Tensor
    low_grad: Tensor

    def probabilities(self, base: Tensor, work: Tensor, up: Tensor) -> Tensor:
        """[n, S] unnormalised probabilities, in the memory of `work`."""
        if self.rows is None:
            tile = torch.addmm(base, self.low_bits, up.T, out=work)
        else:
            tile = torch.index_select(base, 0, self.rows, out=work[: len(self.rows)]).addmm_(self.low_bits, up.T)
        if self.shift is not None:
            tile.sub_(self.shift[:, None])
        return tile.exp2_()

    def add_weighted(self, weighted: Tensor, probabilities: Tensor) -> None:
        """Adds coefficient times probabilities to the tile's rows; `probabilities` may be overwritten."""
        if self.rows is None:
            weighted.addcmul_(probabilities, self.coefficient[:, None])
        else:
            weighted.index_add_(0, self.rows, probabilities.mul_(self.coefficient[:, None]))


def _learners(low: Float[Tensor, "K n r"], grad: Float[Tensor, "K n"], lse: Float[Tensor, "R n"]) -> list[_Learner]:
    """The experts that learn from tokens of a span; one without any costs nothing."""
    distance = lse[1:] - lse[0]
    # Where an expert shares the base's shift, tiles hold p_k 2^(lse_k - lse_0).
    shared_max = (distance.abs() <= _SAFE_BITS).all(1).tolist()
    found = []
    for k, shared in enumerate(shared_max):
        rows = rows_with_gradient(grad[k, :, None])
        if rows is not None and len(rows) == 0:
            continue
        chosen = slice(None) if rows is None else rows
        low_k, away = low[k, chosen], distance[k, chosen]
        factor = -grad[k, chosen] * torch.exp2(-away) if shared else -grad[k, chosen]
        weighted_low = (low_k * factor[:, None]).T.contiguous()
        shift = None if shared else away
        found.append(_Learner(k, rows, low_k * LOG2E, shift, factor, weighted_low, torch.zeros_like(low_k)))
    return found


CHUNKED = Passes(log_sum_exp, subtract_expectations)
