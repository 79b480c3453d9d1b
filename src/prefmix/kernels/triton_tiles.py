"""Triton kernels that read tiles of base logits and give softmax sums and gradients of K low-rank heads.

A matrix-product library computes base logits far better than a kernel of ours would, so these kernels start from a
buffer of them. Each reads a tile and rebuilds the probabilities of an expert in registers: [K, T, V] exists nowhere.
No atomics: every number is summed by one program in one order, so a run repeats bit for bit.

Only `triton_low_rank` imports this file, and only when Triton is asked for. Legend: C tokens and S vocabulary entries
of a chunk, K experts, r rank; BT x BV one tile; R the rank padded to a power of two, at least 16 (as `tl.dot` wants).
All logits are in bits. Annotations here are Triton's, which nothing but its compiler may read (`no_type_check`).
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _base_tile(
    logits, bias, rows, columns, num_rows, num_columns, row_stride, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr
):
    # [BT, BV] base logits in bits; -inf beyond the vocabulary, so that its probability is 0.
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tile = tl.load(logits + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0).to(DTYPE)
    if HAS_BIAS:
        tile += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(DTYPE)[None, :]
    return tl.where((columns < num_columns)[None, :], tile * 1.4426950408889634, float("-inf"))


@triton.jit
@no_type_check
def _low_tile(low, rows, num_rows, rank, R: tl.constexpr):
    # [BT, R] rows of a contiguous [C, r]; zeros beyond either.
    ranks = tl.arange(0, R)
    inside = (rows < num_rows)[:, None] & (ranks < rank)[None, :]
    return tl.load(low + rows[:, None] * rank + ranks[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def _up_tile(up, columns, num_columns, rank, rank_stride, vocab_stride, R: tl.constexpr):
    # [R, BV] B_k^T; zeros beyond either.
    ranks = tl.arange(0, R)
    inside = (ranks < rank)[:, None] & (columns < num_columns)[None, :]
    offsets = ranks[:, None].to(tl.int64) * rank_stride + columns[None, :] * vocab_stride
    return tl.load(up + offsets, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _store_log_sum(out, tile, rows, num_rows):
    # log2 sum 2^x over the tile's columns, of each row.
    largest = tl.max(tile, 1)
    total = tl.sum(tl.exp2(tile - largest[:, None]), 1)
    tl.store(out + rows, largest + tl.log2(total), mask=rows < num_rows)


# The arguments that all kernels share, in this order:
#   logits [C, S]   base logits in nats, in the product's type          bias [S]   or anything where HAS_BIAS is False
#   low [K, C, r]   A_k h in bits, contiguous                           up [K, S, r]   B_k, by its three strides


@triton.jit
@no_type_check
def log_sum_kernel(
    logits, bias, low, up, num_rows, num_columns, rank, row_stride, up_expert, up_rank, up_vocab,
    out,  # [K + 1, number of vocabulary blocks, C] log2 sum 2^logit over a block: the base, then the experts
    K: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    dtype = low.dtype.element_ty
    base = _base_tile(logits, bias, rows, columns, num_rows, num_columns, row_stride, HAS_BIAS, dtype)
    out += tl.program_id(1).to(tl.int64) * num_rows
    expert_stride = tl.num_programs(1).to(tl.int64) * num_rows
    _store_log_sum(out, base, rows, num_rows)
    for k in range(K):
        low_k = _low_tile(low + k * num_rows * rank, rows, num_rows, rank, R)
        up_k = _up_tile(up + k * up_expert, columns, num_columns, rank, up_rank, up_vocab, R)
        correction = tl.dot(low_k, up_k, input_precision=PRECISION, out_dtype=dtype)
        out += expert_stride
        _store_log_sum(out, base + correction, rows, num_rows)


@triton.jit
@no_type_check
def low_gradient_kernel(
    logits, bias, low, up, num_rows, num_columns, rank, row_stride, up_expert, up_rank, up_vocab,
    lse,  # [K, C] in bits, contiguous, as are those below
    coefficient,  # [K, C]
    grad_low,  # [K, C, r], to which coefficient_kt E_p[B_k] over this chunk's vocabulary is added
    R: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Experts are the fastest axis of the grid: the K programs that read the same logits run side by side.
    k = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BT + tl.arange(0, BT)
    dtype = low.dtype.element_ty
    factor = tl.load(coefficient + k * num_rows + rows, mask=rows < num_rows, other=0.0)
    # An expert that learns from none of these tokens costs nothing. NaN != 0, so NaN is never dropped.
    if tl.sum((factor != 0.0).to(tl.int32), 0) > 0:
        shift = tl.load(lse + k * num_rows + rows, mask=rows < num_rows, other=0.0)
        low_k = _low_tile(low + k * num_rows * rank, rows, num_rows, rank, R)
        total = tl.zeros([BT, R], dtype=dtype)
        for start in range(0, num_columns, BV):
            columns = start + tl.arange(0, BV)
            tile = _base_tile(logits, bias, rows, columns, num_rows, num_columns, row_stride, HAS_BIAS, dtype)
            up_k = _up_tile(up + k * up_expert, columns, num_columns, rank, up_rank, up_vocab, R)
            tile += tl.dot(low_k, up_k, input_precision=PRECISION, out_dtype=dtype)
            probabilities = tl.exp2(tile - shift[:, None])
            total += tl.dot(probabilities, tl.trans(up_k), input_precision=PRECISION, out_dtype=dtype)
        ranks = tl.arange(0, R)
        where = grad_low + k * num_rows * rank + rows[:, None] * rank + ranks[None, :]
        inside = (rows < num_rows)[:, None] & (ranks < rank)[None, :]
        tl.store(where, tl.load(where, mask=inside, other=0.0) + total * factor[:, None], mask=inside)


@triton.jit
@no_type_check
def up_gradient_kernel(
    logits, bias, low, up, num_rows, num_columns, rank, row_stride, up_expert, up_rank, up_vocab,
    lse,  # [K, C] in bits, contiguous, as are those below
    coefficient,  # [K, C]
    weighted_low,  # [K, C, r] coefficient A_k h, in nats
    grad_up,  # [K, r, S] by its first two strides, to which sum_t weighted_low_kt p_kt^T of this chunk is added
    grad_expert, grad_rank,
    R: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    dtype = low.dtype.element_ty
    up_k = _up_tile(up + k * up_expert, columns, num_columns, rank, up_rank, up_vocab, R)
    total = tl.zeros([R, BV], dtype=dtype)
    for start in range(0, num_rows, BT):
        rows = start + tl.arange(0, BT)
        factor = tl.load(coefficient + k * num_rows + rows, mask=rows < num_rows, other=0.0)
        if tl.sum((factor != 0.0).to(tl.int32), 0) > 0:
            shift = tl.load(lse + k * num_rows + rows, mask=rows < num_rows, other=0.0)
            low_k = _low_tile(low + k * num_rows * rank, rows, num_rows, rank, R)
            weighted = _low_tile(weighted_low + k * num_rows * rank, rows, num_rows, rank, R)
            tile = _base_tile(logits, bias, rows, columns, num_rows, num_columns, row_stride, HAS_BIAS, dtype)
            tile += tl.dot(low_k, up_k, input_precision=PRECISION, out_dtype=dtype)
            probabilities = tl.exp2(tile - shift[:, None])
            total += tl.dot(tl.trans(weighted), probabilities, input_precision=PRECISION, out_dtype=dtype)
    ranks = tl.arange(0, R)
    where = grad_up + k * grad_expert + ranks[:, None].to(tl.int64) * grad_rank + columns[None, :]
    inside = (ranks < rank)[:, None] & (columns < num_columns)[None, :]
    tl.store(where, tl.load(where, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
@no_type_check
def weighted_probabilities_kernel(
    logits, bias, low, up, num_rows, num_columns, rank, row_stride, up_expert, up_rank, up_vocab,
    lse,  # [K, C] in bits, contiguous
    coefficient,  # [K, C] contiguous
    out,  # [C, S] sum_k coefficient_kt p_kt, rows as far apart as those of logits
    K: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    dtype = low.dtype.element_ty
    base = _base_tile(logits, bias, rows, columns, num_rows, num_columns, row_stride, HAS_BIAS, dtype)
    total = tl.zeros([BT, BV], dtype=dtype)
    for k in range(K):
        factor = tl.load(coefficient + k * num_rows + rows, mask=rows < num_rows, other=0.0)
        if tl.sum((factor != 0.0).to(tl.int32), 0) > 0:
            shift = tl.load(lse + k * num_rows + rows, mask=rows < num_rows, other=0.0)
            low_k = _low_tile(low + k * num_rows * rank, rows, num_rows, rank, R)
            up_k = _up_tile(up + k * up_expert, columns, num_columns, rank, up_rank, up_vocab, R)
            correction = tl.dot(low_k, up_k, input_precision=PRECISION, out_dtype=dtype)
            total += factor[:, None] * tl.exp2(base + correction - shift[:, None])
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    offsets = rows[:, None] * row_stride + columns[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)
