"""Log-probabilities of texts under K low-rank corrections of one frozen output head, logits never stored.

Expert k's logits at a token with state h are z + (h A_k^T) B_k^T with z = W h + b, the base logits. The product W h is
the expensive part; it is computed once per tile for the reference and all K experts, forward and again in the backward.

Legend: T tokens, N texts, K experts, D hidden, V vocabulary, r rank.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.kernels.output_tile import OutputTile
from prefmix.kernels.sparsity import at_rows, rows_with_gradient
from prefmix.kernels.texts import HeadLogProbs, sum_by_text
from prefmix.kernels.tiles import LN2, LOG2E, Tiles, accumulation_dtype, default_tiles, spans

# A correction of at most this many bits lets an expert share the base logits' maximum: its largest term is then at
# least 2^-40, and none exceeds 2^40, both far inside float32.
_SAFE_BITS = 40.0


def head_log_probs(
    hidden: Float[Tensor, "T D"],
    targets: Int[Tensor, "T"],
    segments: Int[Tensor, "T"],
    num_texts: int,
    base_weight: Float[Tensor, "V D"],
    down: Float[Tensor, "K r D"],
    up: Float[Tensor, "K V r"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    impl: Literal["auto", "chunked", "eager"] = "auto",
    tiles: Tiles | None = None,
) -> HeadLogProbs:
    """Sequence log-probabilities of K low-rank heads and of the base head.

        logits_k = W h + b + B_k (A_k h),    log p_k(text) = sum_t logits_k[y_t] - logsumexp_v logits_k[v]

    The base product runs in the type of `base_weight`; corrections, softmax and sums in float32 (float64 where inputs
    are). Gradients flow to `down`, `up` and, where it requires one, `hidden`; not to the frozen base, and not through
    `base_log_probs`. With up = 0 the experts equal the base bit for bit.

    Args:
        hidden: [T, D] final states at the positions that predict the targets.
        targets: [T] token ids, 0..V-1.
        segments: [T] the text of each token, 0..N-1.
        num_texts: N.
        base_weight: [V, D] frozen output head W.
        down: [K, r, D] A_k. K = 0 computes the reference alone.
        up: [K, V, r] B_k. A head in hidden space, W (h + U_k A_k h), is B_k = W U_k.
        bias: [V] frozen bias b of the output head.
        impl: "chunked" (also "auto") holds two tiles of logits; "eager" materialises [K, T, V], for tests.
        tiles: size of a tile; by default what was measured best for the device.

    Returns:
        `HeadLogProbs` in nats.

    Relations: `full_head.full_head_log_probs` for heads without low-rank structure.
    """
    accumulate = accumulation_dtype(torch.promote_types(hidden.dtype, down.dtype))
    tiles = default_tiles(hidden.device) if tiles is None else tiles
    # Types are chosen here; a trainer's autocast must not put the corrections into 16 bits.
    with torch.autocast(hidden.device.type, enabled=False):
        low = torch.einsum("td,krd->ktr", hidden.to(accumulate), down.to(accumulate))
        if impl == "eager":
            tokens = _eager(hidden, low, up.to(accumulate), base_weight, bias, targets)
        else:
            tokens = _LowRankHead.apply(hidden, low, up.to(accumulate), base_weight, bias, targets, tiles)
        return sum_by_text(*tokens, segments, num_texts)


class _TokenLogProbs(NamedTuple):
    experts: Float[Tensor, "T K"]
    base: Float[Tensor, "T"]


def _eager(
    hidden: Float[Tensor, "T D"],
    low: Float[Tensor, "K T r"],
    up: Float[Tensor, "K V r"],
    base_weight: Float[Tensor, "V D"],
    bias: Float[Tensor, "V"] | None,
    targets: Int[Tensor, "T"],
) -> _TokenLogProbs:
    base = (hidden.to(base_weight.dtype) @ base_weight.T).to(low.dtype)
    base = base if bias is None else base + bias.to(low.dtype)
    logits = base + torch.einsum("ktr,kvr->ktv", low, up)
    index = targets[:, None]
    experts = logits.log_softmax(-1).gather(-1, index.expand(len(logits), -1, -1)).squeeze(-1)
    return _TokenLogProbs(experts.T, base.detach().log_softmax(-1).gather(-1, index).squeeze(-1))


class _Problem(NamedTuple):
    """Inputs of the kernel after casting.

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


class _LowRankHead(torch.autograd.Function):
    """Token log-probabilities under K heads, with a backward that recomputes the base logits once for all of them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        low: Tensor,
        up: Tensor,
        base_weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor]:
        problem = _Problem(hidden.to(base_weight.dtype), low, up, base_weight, bias, targets)
        shared_max = _shares_maximum(low, up)
        lse = _log_sum_exp(problem, shared_max, tiles)
        log_probs = _target_logits(problem).sub_(lse, alpha=LN2)
        base_log_probs = log_probs[0].clone()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*problem, lse)
            ctx.shared_max, ctx.tiles, ctx.hidden_dtype = shared_max, tiles, hidden.dtype
        ctx.mark_non_differentiable(base_log_probs)
        return log_probs[1:].T, base_log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, lse = ctx.saved_tensors
        problem = _Problem(*inputs)
        # Tokens that no expert learns from need no base logits either.
        read = rows_with_gradient(grad)
        part, part_lse, part_grad = problem, lse, grad.T.contiguous()
        if read is not None:
            part = problem._replace(
                states=problem.states[read], low=problem.low[:, read], targets=problem.targets[read]
            )
            part_lse, part_grad = lse[:, read], part_grad[:, read]
        grads = _Gradients.zeros(part, *ctx.needs_input_grad[:3])
        _subtract_expectations(grads, part_grad, part, part_lse, ctx.shared_max, ctx.tiles)
        _add_targets(grads, part_grad, part)
        grad_hidden = None if grads.hidden is None else at_rows(grads.hidden, read, len(problem.states), dim=0)
        grad_low = None if grads.low is None else at_rows(grads.low, read, len(problem.states), dim=1)
        grad_up = None if grads.up is None else grads.up.transpose(1, 2)
        return None if grad_hidden is None else grad_hidden.to(ctx.hidden_dtype), grad_low, grad_up, *[None] * 4


class _Gradients(NamedTuple):
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
    def zeros(cls, problem: _Problem, hidden: bool, low: bool, up: bool) -> _Gradients:
        num_experts, vocab, rank = problem.up.shape
        return cls(
            hidden=torch.zeros_like(problem.states, dtype=problem.low.dtype) if hidden else None,
            low=torch.zeros_like(problem.low) if low else None,
            up=problem.up.new_zeros(num_experts, rank, vocab) if up else None,
        )


def _shares_maximum(low: Float[Tensor, "K T r"], up: Float[Tensor, "K V r"]) -> list[bool]:
    """Whether |B_k[v] . low_kt| <= |B_k[v]| |low_kt| is small enough to use the base logits' maximum as the shift."""
    if low.numel() == 0:
        return [True] * len(low)
    bound = torch.linalg.vector_norm(low, dim=-1).amax(-1) * torch.linalg.vector_norm(up, dim=-1).amax(-1)
    return (bound * LOG2E <= _SAFE_BITS).tolist()


def _log_sum_exp(problem: _Problem, shared_max: list[bool], tiles: Tiles) -> Float[Tensor, "R T"]:
    """log2 sum_v 2^logit of the base (row 0) and of every expert, by a running maximum over tiles."""
    num_experts, num_tokens = problem.low.shape[:2]
    low_bits = problem.low * LOG2E
    shift = low_bits.new_full((num_experts + 1, num_tokens), -torch.inf)
    total = torch.zeros_like(shift)
    follows_base = torch.tensor([True, *shared_max], device=shift.device)[:, None]
    output = OutputTile.allocate(problem.base_weight, problem.bias, num_tokens, tiles, low_bits.dtype)
    for tokens in spans(num_tokens, tiles.tokens):
        for vocab in spans(len(problem.base_weight), tiles.vocab):
            base, work = output.logits(problem.states[tokens], vocab)
            old, base_max = shift[:, tokens], torch.maximum(shift[0, tokens], base.amax(-1))
            new = torch.where(follows_base, base_max, old)
            # Before an expert's first tile old = new = -inf; its total is 0 then.
            total[:, tokens] *= torch.exp2(old - new).nan_to_num_(nan=0.0)
            base.sub_(base_max[:, None])
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


def _target_logits(problem: _Problem) -> Float[Tensor, "R T"]:
    """Logit of the target, in nats, under the base (row 0) and every expert."""
    states, low, up, base_weight, bias, targets = problem
    base = torch.linalg.vecdot(states.to(low.dtype), base_weight[targets].to(low.dtype))
    if bias is not None:
        base = base + bias[targets].to(low.dtype)
    return torch.cat([base[None], base + torch.linalg.vecdot(low, up[:, targets])])


def _subtract_expectations(
    grads: _Gradients,
    grad: Float[Tensor, "K T"],
    problem: _Problem,
    lse: Float[Tensor, "R T"],
    shared_max: list[bool],
    tiles: Tiles,
) -> None:
    """The -g p half of every gradient; p is used unnormalised, its scale goes into the small factors."""
    states, low, up, base_weight, bias, _ = problem
    shared_mask = torch.tensor(shared_max, device=low.device, dtype=torch.bool)[:, None]
    # Where an expert shares the base's shift, tiles hold p_k 2^(lse_k - lse_0).
    coefficient = torch.where(shared_mask, grad * torch.exp2(lse[0] - lse[1:]), grad).neg_()
    output = OutputTile.allocate(base_weight, bias, len(states), tiles, low.dtype)
    for tokens in spans(len(states), tiles.tokens):
        learners = _learners(tokens, low, coefficient, lse, shared_max)
        for vocab in spans(len(base_weight), tiles.vocab):
            base, work = output.logits(states[tokens], vocab)
            base.sub_(lse[0, tokens, None])
            weighted = torch.zeros_like(base) if grads.hidden is not None else None
            for learner in learners:
                probabilities = learner.probabilities(base, work, up[learner.expert, vocab])
                if grads.low is not None:
                    learner.low_grad.addmm_(probabilities, up[learner.expert, vocab])
                if grads.up is not None:
                    grads.up[learner.expert, :, vocab].addmm_(learner.weighted_low, probabilities)
                if weighted is not None:
                    learner.add_weighted(weighted, probabilities)
            if grads.hidden is not None and weighted is not None:
                grads.hidden[tokens].addmm_(weighted, base_weight[vocab].to(low.dtype))
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


def _learners(
    tokens: slice, low: Float[Tensor, "K T r"], coefficient: Float[Tensor, "K T"], lse: Tensor, shared_max: list[bool]
) -> list[_Learner]:
    """The experts that learn from tokens of this tile; one without any costs nothing."""
    found = []
    for k, shared in enumerate(shared_max):
        rows = rows_with_gradient(coefficient[k, tokens, None])
        if rows is not None and len(rows) == 0:
            continue
        chosen = slice(None) if rows is None else rows
        factor, low_k = coefficient[k, tokens][chosen], low[k, tokens][chosen]
        shift = None if shared else (lse[k + 1, tokens] - lse[0, tokens])[chosen]
        weighted_low = (low_k * factor[:, None]).T.contiguous()
        found.append(_Learner(k, rows, low_k * LOG2E, shift, factor, weighted_low, torch.zeros_like(low_k)))
    return found


def _add_targets(grads: _Gradients, grad: Float[Tensor, "K T"], problem: _Problem) -> None:
    """The +g onehot(y) half of every gradient."""
    low, targets = problem.low, problem.targets
    if grads.low is not None:
        grads.low.add_(problem.up[:, targets] * grad[:, :, None])
    if grads.up is not None:
        grads.up.index_add_(2, targets, (low * grad[:, :, None]).transpose(1, 2))
    if grads.hidden is not None:
        grads.hidden.addcmul_(problem.base_weight[targets].to(low.dtype), grad.sum(0)[:, None])
