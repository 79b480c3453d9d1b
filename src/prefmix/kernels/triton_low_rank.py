"""Log-probabilities of tokens under K low-rank heads by Triton kernels: the GPU's way to `low_rank_head`.

Base logits of a chunk come from one matrix product into a buffer; one kernel reads it and gives the softmax sums of
the base and all K experts, and in the backward, after the same product, two kernels (a third where states learn) give
the gradients. Beside the buffer only [K + 1, S / 64, C] partial sums are held.

Importing this file imports Triton, so nothing imports it before it is asked for. It was tested through Triton's
interpreter on a CPU (TRITON_INTERPRET=1 before Triton is imported) and compiled for two generations of GPUs, but never
ran on one: sizes are reasoned, not measured.

Legend: T tokens, C tokens of a chunk, S vocabulary entries of a chunk, K experts, R = K + 1, D hidden, V vocabulary,
r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.kernels.low_rank_problem import Gradients, Problem, add_targets, target_logits
from prefmix.kernels.sparsity import at_rows, rows_with_gradient
from prefmix.kernels.tiles import LN2, LOG2E, Tiles, spans
from prefmix.kernels.triton_tiles import (
    log_sum_kernel,
    low_gradient_kernel,
    up_gradient_kernel,
    weighted_probabilities_kernel,
)

# 4096 x 16384 logits in bfloat16 take 128 MiB; a product of that size reaches a large GPU's peak.
DEFAULT_CHUNK = Tiles(tokens=4096, vocab=16384)


class Blocks(NamedTuple):
    """One program's tile of logits; both are powers of two, at least 16."""

    tokens: int
    vocab: int


def default_blocks(rank: int) -> Blocks:
    """The largest tile that the compiler keeps in registers, for compute capabilities 8.0 and 9.0 (`cuobjdump`)."""
    return Blocks(64, 64) if rank <= 32 else Blocks(32, 32)


def low_rank_token_log_probs(
    hidden: Float[Tensor, "T D"],
    low: Float[Tensor, "K T r"],
    up: Float[Tensor, "K V r"],
    base_weight: Float[Tensor, "V D"],
    bias: Float[Tensor, "V"] | None,
    targets: Int[Tensor, "T"],
    chunk: Tiles | None = None,
    blocks: Blocks | None = None,
) -> tuple[Float[Tensor, "T K"], Float[Tensor, "T"]]:
    """Log-probabilities of targets under K heads and, without gradient, under the base, in nats.

        log p_k(y_t) = z_k[y_t] - logsumexp_v z_k[v],   z_k = W h + b + B_k (A_k h)

    The base product runs in the type of `base_weight` and is rounded to it, as in the chunked path; corrections,
    softmax and sums run in the type of `low`. Gradients flow to `hidden`, `low` and `up`. With up = 0 the experts
    equal the base bit for bit.

    Args:
        hidden: [T, D] states at the positions that predict the targets.
        low: [K, T, r] A_k h, float32 or float64.
        up: [K, V, r] B_k in the type of `low`, with any strides.
        base_weight: [V, D] frozen head W.
        bias: [V] frozen bias b, or None.
        targets: [T].
        chunk: how many logits the buffer holds; by default 4096 x 16384.
        blocks: one program's tile.

    Raises:
        ValueError: the tensors are on a CPU and Triton does not interpret.

    Relations: `low_rank_head.head_log_probs` calls this for impl="triton" and sums tokens by text.
    """
    if hidden.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError('impl="triton" on a CPU: Triton kernels run on a GPU; use impl="chunked" (or "auto")')
    cuts = _Cuts(chunk or DEFAULT_CHUNK, blocks or default_blocks(low.shape[2]))
    problem = Problem(hidden.detach().to(base_weight.dtype), low, up, base_weight, bias, targets)
    return _TritonHead.apply(hidden, *problem, cuts)


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why the kernels are not to be trusted on this device, or None: they must agree with torch on a small problem.

    Runs once a process and device. Compilers, drivers and cards differ, and a wrong gradient says nothing of itself.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (35, 24), "low": (2, 35, 5), "up": (2, 90, 5), "weight": (90, 24), "grad": (35, 2)}
    drawn = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    targets = torch.randint(90, (35,), generator=generator).to(device)

    def values(function: Callable[..., Any]) -> list[Tensor]:
        leaves = [drawn[name].clone().requires_grad_() for name in ("hidden", "low", "up")]
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            experts, base = function(*leaves, drawn["weight"], None, targets)
            return [experts.detach(), base, *torch.autograd.grad((experts * drawn["grad"]).sum(), leaves)]

    try:
        found = values(low_rank_token_log_probs)
    except Exception as error:  # whatever compiler, driver or card object to, torch can do it
        return f"the Triton kernels do not run here ({type(error).__name__}: {str(error).strip()[:200]})"
    pairs = zip(found, values(_materialised), strict=True)
    worst = max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)
    return None if worst < 1e-2 else f"the Triton kernels differ from torch here (relative difference {worst:.1e})"


def _materialised(
    hidden: Tensor, low: Tensor, up: Tensor, base_weight: Tensor, bias: None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    base = hidden @ base_weight.T
    index = targets[:, None]
    experts = (base + low @ up.transpose(1, 2)).log_softmax(-1).gather(-1, index.expand(len(low), -1, -1))
    return experts[..., 0].T, base.detach().log_softmax(-1).gather(-1, index)[:, 0]


class _Cuts(NamedTuple):
    """Attributes:
    chunk: size of the buffer of logits.
    blocks: one program's tile.
    """

    chunk: Tiles
    blocks: Blocks


class _TritonHead(torch.autograd.Function):
    """The backward computes base logits a second time, for all experts at once."""

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
        cuts: _Cuts,
    ) -> tuple[Tensor, Tensor]:
        problem = Problem(states, low, up, base_weight, bias, targets)
        lse = _log_sums(problem, cuts)
        log_probs = target_logits(problem).sub_(lse, alpha=LN2)
        base_log_probs = log_probs[0].clone()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*problem, lse[1:])
            ctx.cuts, ctx.hidden_dtype = cuts, hidden.dtype
        ctx.mark_non_differentiable(base_log_probs)
        return log_probs[1:].T, base_log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, lse = ctx.saved_tensors
        problem, num_tokens = Problem(*inputs), len(grad)
        read, grad = rows_with_gradient(grad), grad.T.contiguous()
        # Tokens that no expert learns from need no base logits either.
        if read is not None:
            problem, lse, grad = problem.rows(read), lse[:, read], grad[:, read]
        needs_hidden, _, needs_low, needs_up = ctx.needs_input_grad[:4]
        grads = Gradients.zeros(problem, needs_hidden, needs_low, needs_up)
        for tokens in spans(grad.shape[1], ctx.cuts.chunk.tokens):
            _subtract_expectations(grads, grad[:, tokens], problem, lse[:, tokens], tokens, ctx.cuts)
        add_targets(grads, grad, problem)
        grad_hidden = None if grads.hidden is None else at_rows(grads.hidden, read, num_tokens, dim=0)
        grad_low = None if grads.low is None else at_rows(grads.low, read, num_tokens, dim=1)
        grad_up = None if grads.up is None else grads.up.transpose(1, 2)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(ctx.hidden_dtype)
        return grad_hidden, None, grad_low, grad_up, *[None] * 4


def _log_sums(problem: Problem, cuts: _Cuts) -> Float[Tensor, "R T"]:
    """log2 sum_v 2^logit of the base (row 0) and of every expert."""
    num_experts, num_tokens = problem.low.shape[:2]
    lse = problem.low.new_full((num_experts + 1, num_tokens), -torch.inf)
    for tokens in spans(num_tokens, cuts.chunk.tokens):
        part = problem.rows(tokens)
        low_bits = (part.low * LOG2E).contiguous()
        for vocab in spans(len(problem.base_weight), cuts.chunk.vocab):
            launch = _Launch.prepare(part, low_bits, vocab, cuts.blocks)
            sums = lse.new_empty(num_experts + 1, launch.vocab_blocks, len(part.states))
            launch.run(log_sum_kernel, (launch.token_blocks, launch.vocab_blocks), sums, K=num_experts)
            lse[:, tokens] = torch.logaddexp2(lse[:, tokens], _log_sum_over_blocks(sums))
    return lse


def _log_sum_over_blocks(sums: Float[Tensor, "R n C"]) -> Float[Tensor, "R C"]:
    largest = sums.amax(1)
    return largest + (sums - largest[:, None]).exp2_().sum(1).log2_()


def _subtract_expectations(
    grads: Gradients,
    grad: Float[Tensor, "K C"],
    problem: Problem,
    lse: Float[Tensor, "K C"],
    tokens: slice,
    cuts: _Cuts,
) -> None:
    """The -g p half of every gradient, of the tokens `tokens`."""
    part, num_experts = problem.rows(tokens), len(grad)
    coefficient, lse = (-grad).contiguous(), lse.contiguous()
    low_bits, weighted_low = (part.low * LOG2E).contiguous(), (part.low * coefficient[:, :, None]).contiguous()
    grad_low = None if grads.low is None else grads.low[:, tokens].contiguous()
    for vocab in spans(len(part.base_weight), cuts.chunk.vocab):
        launch = _Launch.prepare(part, low_bits, vocab, cuts.blocks)
        shared = (lse, coefficient)
        if grad_low is not None:
            launch.run(low_gradient_kernel, (num_experts, launch.token_blocks), *shared, grad_low)
        if grads.up is not None:
            columns = grads.up[:, :, vocab]
            strides = columns.stride()[:2]
            launch.run(up_gradient_kernel, (num_experts, launch.vocab_blocks), *shared, weighted_low, columns, *strides)
        if grads.hidden is not None:
            weighted = torch.empty_like(launch.logits)
            grid = (launch.token_blocks, launch.vocab_blocks)
            launch.run(weighted_probabilities_kernel, grid, *shared, weighted, K=num_experts)
            grads.hidden[tokens] += weighted @ part.base_weight[vocab]
    if grads.low is not None and grad_low is not None:
        grads.low[:, tokens] = grad_low


class _Launch(NamedTuple):
    """A chunk of base logits and the arguments that every kernel takes first.

    Attributes:
        logits: [C, S] base logits in nats, in the product's type.
        arguments: as `triton_tiles` lists them.
        constants: the compile-time arguments that all kernels share.
        token_blocks, vocab_blocks: how many tiles the chunk has.
    """

    logits: Tensor
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    token_blocks: int
    vocab_blocks: int

    @classmethod
    def prepare(cls, part: Problem, low_bits: Float[Tensor, "K C r"], vocab: slice, blocks: Blocks) -> _Launch:
        """The one matrix product of a chunk."""
        logits = part.states @ part.base_weight[vocab].T
        up = part.up[:, vocab]
        bias = logits if part.bias is None else part.bias[vocab]
        (rows, columns), rank = logits.shape, up.shape[2]
        expert_stride, vocab_stride, rank_stride = up.stride()
        constants = {
            "R": max(16, triton.next_power_of_2(rank)),
            "BT": blocks.tokens,
            "BV": blocks.vocab,
            "HAS_BIAS": part.bias is not None,
            "num_stages": 2,
            # Three products in TF32 are as exact as one in float32 and run on tensor cores.
            "PRECISION": "tf32x3" if low_bits.dtype == torch.float32 and torch.version.hip is None else "ieee",
        }
        return cls(
            logits,
            (
                logits,
                bias,
                low_bits,
                up,
                rows,
                columns,
                rank,
                logits.stride(0),
                expert_stride,
                rank_stride,
                vocab_stride,
            ),
            constants,
            triton.cdiv(rows, blocks.tokens),
            triton.cdiv(columns, blocks.vocab),
        )

    def run(self, kernel: Callable[..., Any], grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
        """Starts one program for each point of the grid."""
        with torch.cuda.device_of(self.logits):
            kernel[grid](*self.arguments, *arguments, **self.constants, **constants)  # type: ignore[index]
