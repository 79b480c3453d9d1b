"""K low-rank heads on a CPU by compiled code: what is done to a piece of base logits is done in the first cache.

The base product and the product with W stay torch's. With several threads the tokens of a tile are shared out in the
forward, its columns in the backward; ctypes lets go of Python's lock.

Legend: T tokens, C tokens of a tile, S vocabulary entries of a tile, K experts, r rank, R = K + 1.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.kernels.c_library import HeadsPointer, NoLibraryError, TilePointer, load_library
from prefmix.kernels.logit_plane import LogitPlane
from prefmix.kernels.low_rank_chunked import CHUNKED
from prefmix.kernels.low_rank_problem import Demand, Gradients, Passes, Problem
from prefmix.kernels.tiles import LOG2E, Tiles

logger = logging.getLogger(__name__)

MAX_RANK = 64


def unsuitable(demand: Demand) -> str | None:
    """Why this implementation is not for a problem, or None; the machine is another question (`why_not`)."""
    if demand.device.type != "cpu":
        return f"it runs on a CPU, not on {demand.device.type}"
    if demand.dtype != torch.float32:
        return f"it sums in float32, not in {demand.dtype}"
    if demand.base_dtype not in (torch.float32, torch.bfloat16):
        return f"it takes a base head in float32 or bfloat16, not in {demand.base_dtype}"
    return f"its rank is at most {MAX_RANK}, not {demand.rank}" if demand.rank > MAX_RANK else None


@functools.cache
def why_not() -> str | None:
    """Why there is no compiled code on this machine, or None where there is.

    It is compiled and compared with pure torch on the first call.
    """
    try:
        error = _self_check()
        if not error < 1e-4:
            raise NoLibraryError(f"the compiled code differs from pure torch by {error:.1e}")
    except NoLibraryError as error:
        logger.debug("low-rank heads run in pure torch: %s", error)
        return str(error)
    return None


def log_sum_exp(problem: Problem, plane: LogitPlane) -> Float[Tensor, "R T"]:
    """log2 sum_v 2^logit of the base (row 0) and of every expert, by a running maximum over pieces of tiles."""
    sums = _Sums(problem)
    for tokens in plane.token_spans():
        for vocab in plane.vocab_spans():
            tile = _Tile(plane, plane.product(problem.states, tokens, vocab), tokens.start, vocab)
            _share_out(functools.partial(sums.add, tile), tokens.stop - tokens.start, unit=4)
    return sums.shift.add_(sums.total.log2_())


def subtract_expectations(
    grads: Gradients, grad: Float[Tensor, "K T"], problem: Problem, lse: Float[Tensor, "R T"], plane: LogitPlane
) -> None:
    """The -g p half of every gradient; `grads.low` must come as zeros."""
    expectations = _Expectations(grads, grad, problem, lse)
    for tokens in plane.token_spans():
        if not bool(grad[:, tokens].any()):
            continue
        for vocab in plane.vocab_spans():
            product = plane.product(problem.states, tokens, vocab)
            mixed = None if grads.hidden is None else torch.empty_like(product, dtype=lse.dtype)
            tile = _Tile(plane, product, tokens.start, vocab)
            _share_out(functools.partial(expectations.add, tile, mixed), vocab.stop - vocab.start, unit=128)
            if grads.hidden is not None and mixed is not None:
                grads.hidden[tokens].addmm_(mixed, plane.weight[vocab].to(mixed.dtype))
    expectations.finish()


COMPILED = Passes(log_sum_exp, subtract_expectations)


class _Tile(NamedTuple):
    """A tile of base logits, or a part of one.

    Attributes:
        plane: what it is of.
        product: [C, S] as the product left it.
        first: the first token's place among T.
        vocab: its columns among V.
    """

    plane: LogitPlane
    product: Tensor
    first: int
    vocab: slice

    def rows(self, part: slice) -> _Tile:
        """Some tokens."""
        return self._replace(product=self.product[part], first=self.first + part.start)

    def columns(self, part: slice) -> _Tile:
        """Some columns."""
        vocab = slice(self.vocab.start + part.start, self.vocab.start + part.stop)
        return self._replace(product=self.product[:, part], vocab=vocab)

    @property
    def tokens(self) -> slice:
        """Its tokens among T."""
        return slice(self.first, self.first + len(self.product))

    def bias_bits(self) -> Tensor | None:
        """[S] what is still to be added, in bits."""
        bias = self.plane.bias
        return None if bias is None or self.plane.is_bits else bias[self.vocab].float() * LOG2E

    def pointer(self, bias_bits: Tensor | None) -> TilePointer:
        """For the C source; `bias_bits` must outlive it."""
        half = not self.plane.is_bits
        scale = LOG2E if half else 1.0
        bias = None if bias_bits is None else bias_bits.data_ptr()
        return TilePointer(self.product.data_ptr(), bias, scale, half, *self.product.shape, self.product.stride(0))


class _Heads:
    """The small factors of all experts, in the layout that the C source reads."""

    def __init__(self, problem: Problem) -> None:
        self.low_bits = (problem.low * LOG2E).contiguous()
        self.up = problem.up.transpose(1, 2).contiguous()  # a view where up is W U

    def pointer(self, tile: _Tile) -> HeadsPointer:
        """The experts at the tokens and columns of a tile."""
        low, up = self.low_bits[:, tile.tokens], self.up[:, :, tile.vocab]
        num_experts, rank, _ = up.shape
        return HeadsPointer(
            low.data_ptr(), up.data_ptr(), low.stride(0), self.up.stride(0), self.up.stride(1), num_experts, rank
        )


class _Sums:
    """Running maximum and sums of the forward, [R, T]."""

    def __init__(self, problem: Problem) -> None:
        self._code, self._heads = library(), _Heads(problem)
        num_experts, num_tokens = problem.low.shape[:2]
        self.shift = problem.low.new_full((num_experts + 1, num_tokens), -torch.inf)
        self.total = torch.zeros_like(self.shift)

    def add(self, tile: _Tile, index: int, part: slice) -> int:
        """Some tokens of a tile."""
        tile = tile.rows(part)
        bias, rows = tile.bias_bits(), tile.tokens
        state = (self.shift[:, rows].data_ptr(), self.total[:, rows].data_ptr())
        tile_pointer, heads_pointer = tile.pointer(bias), self._heads.pointer(tile)
        return self._code.prefmix_add_sums(tile_pointer, heads_pointer, *state, self.shift.stride(0))


class _Expectations:
    """Accumulators of the backward."""

    def __init__(self, grads: Gradients, grad: Tensor, problem: Problem, lse: Tensor) -> None:
        self._code, self._heads, self._grads = library(), _Heads(problem), grads
        self._coefficient, self._lse = (-grad).contiguous(), lse.contiguous()
        # Columns of a tile are shared out, and all of them add to the gradient of A h.
        extra = 0 if grads.low is None else torch.get_num_threads() - 1
        self._lows = [grads.low, *(problem.low.new_zeros(problem.low.shape) for _ in range(extra))]

    def add(self, tile: _Tile, mixed: Tensor | None, index: int, part: slice) -> int:
        """Some columns of a tile."""
        low = None if self._grads.low is None else self._lows[index]
        tile = tile.columns(part)
        bias, rows = tile.bias_bits(), tile.tokens
        state = (self._coefficient[:, rows].data_ptr(), self._lse[1:, rows].data_ptr(), self._lse.stride(0))
        outputs = (
            None if low is None else low[:, rows].data_ptr(),
            None if self._grads.up is None else self._grads.up[:, :, tile.vocab].data_ptr(),
            None if mixed is None else mixed[:, part].data_ptr(),
        )
        return self._code.prefmix_add_expectations(tile.pointer(bias), self._heads.pointer(tile), *state, *outputs)

    def finish(self) -> None:
        """Puts the coefficients to the gradient of A h."""
        if self._grads.low is not None:
            for other in self._lows[1:]:
                assert other is not None
                self._grads.low.add_(other)
            self._grads.low.mul_(self._coefficient[:, :, None])


def _share_out(function: Callable[[int, slice], int], total: int, unit: int) -> None:
    """Calls `function` with parts of 0..total, a multiple of `unit` each but the last, one a thread of torch."""
    threads = min(torch.get_num_threads(), -(-total // unit))
    size = -(-total // (threads * unit)) * unit
    parts = [slice(start, min(start + size, total)) for start in range(0, total, size)]
    calls = list(enumerate(parts))
    failed = (
        [function(*calls[0])]
        if len(calls) == 1
        else list(_threads(threads, os.getpid()).map(lambda call: function(*call), calls))
    )
    if any(failed):
        raise MemoryError("no memory for the buffers of a tile of logits")


@functools.cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    # By process, since a fork inherits the pool but not its threads.
    return ThreadPoolExecutor(count, thread_name_prefix="prefmix-kernel")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled code.

    Raises:
        NoLibraryError: it cannot be had on this machine.
    """
    return load_library()


def _self_check() -> float:
    """Largest relative difference to pure torch on a small problem that takes every path of the code."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(21, 8), (3, 21, 5), (3, 301, 5), (301, 8), (301,)]
    states, low, up, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    up[2] *= 30.0  # an expert with a running maximum of its own
    grad = torch.randn(3, 21, generator=generator)
    grad[1, ::3] = 0.0
    worst = 0.0
    for half in (torch.float32, torch.bfloat16):
        problem = Problem(states.to(half), low, up, weight.to(half), bias.to(half), torch.zeros(21, dtype=torch.int64))
        found, expected = _check_run(COMPILED, problem, grad), _check_run(CHUNKED, problem, grad)
        for one, other in zip(found, expected, strict=True):
            worst = max(worst, float((one - other).norm() / other.norm()))
    return worst


def _check_run(passes: Passes, problem: Problem, grad: Tensor) -> list[Tensor]:
    plane = LogitPlane(problem.base_weight, problem.bias, 21, Tiles(16, 200), torch.float32, keep=False)
    lse = passes.log_sum_exp(problem, plane)
    grads = Gradients.zeros(problem, True, True, True)
    passes.subtract_expectations(grads, grad, problem, lse, plane)
    assert grads.hidden is not None and grads.low is not None and grads.up is not None
    return [lse, grads.hidden, grads.low, grads.up]
