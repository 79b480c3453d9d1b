"""Base logits of T tokens over the whole vocabulary, tile by tile: computed when asked for, or kept for the backward.

Computing them is the expensive part of K low-rank heads. Where [T, V] in the product's type fits a budget, the forward
keeps what it computed and the backward reads it; [K, T, V] never exists.

Legend: T tokens, C tokens of a tile, S vocabulary entries of a tile, D hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.kernels.tiles import LOG2E, Tiles, spans


class LogitPlane:
    """Tiles of W h + b.

    Attributes:
        weight: [V, D] W.
        bias: [V] b, or None.
        kept: whether a tile that was computed once is not computed again.
    """

    def __init__(
        self,
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, "V"] | None,
        num_tokens: int,
        tiles: Tiles,
        dtype: torch.dtype,
        keep: bool,
    ) -> None:
        """Takes buffers for tiles and, to keep, for all T V logits.

        Args:
            weight: [V, D].
            bias: [V] or None.
            num_tokens: T.
            tiles: size of a tile.
            dtype: type in which logits are used; products run and are kept in the type of `weight`.
            keep: whether to keep them.
        """
        self.weight, self.bias, self.kept = weight, bias, keep
        self._num_tokens, self._tiles = num_tokens, tiles
        size = min(tiles.tokens, num_tokens) * min(tiles.vocab, len(weight))
        self._logits = torch.empty(size, dtype=dtype, device=weight.device)
        self._work = torch.empty_like(self._logits)
        self._filled: set[tuple[int, int]] = set()
        self._products = _buffers.take(num_tokens * len(weight), weight) if keep else weight.new_empty(size)
        if keep:
            weakref.finalize(self, _buffers.give, self._products)

    @property
    def is_bits(self) -> bool:
        """Whether products are logits in bits already; otherwise they are W h in nats, in the type of W."""
        return self.weight.dtype == self._logits.dtype

    def token_spans(self) -> Iterator[slice]:
        """Cuts the tokens."""
        return spans(self._num_tokens, self._tiles.tokens)

    def vocab_spans(self) -> Iterator[slice]:
        """Cuts the vocabulary."""
        return spans(len(self.weight), self._tiles.vocab)

    def product(self, states: Float[Tensor, "T D"], tokens: slice, vocab: slice) -> Float[Tensor, "C S"]:
        """One tile in the type of W, not to be overwritten; see `is_bits` for its unit."""
        count, width = tokens.stop - tokens.start, vocab.stop - vocab.start
        place = (tokens.start, vocab.start)
        start = tokens.start * len(self.weight) + count * vocab.start if self.kept else 0
        tile = self._products[start : start + count * width].view(count, width)
        if place in self._filled:
            return tile
        if self.is_bits:
            torch.addmm(tile, states[tokens], self.weight[vocab].T, beta=0, alpha=LOG2E, out=tile)
            if self.bias is not None:
                tile.add_(self.bias[vocab].to(tile.dtype), alpha=LOG2E)
        else:
            torch.mm(states[tokens], self.weight[vocab].T, out=tile)
        if self.kept:
            self._filled.add(place)
        return tile

    def bits(self, states: Float[Tensor, "T D"], tokens: slice, vocab: slice) -> BitsTile:
        """One tile as logits in bits and two buffers of its shape, all in the type in which logits are used."""
        product = self.product(states, tokens, vocab)
        logits, work = (buffer[: product.numel()].view(product.shape) for buffer in (self._logits, self._work))
        if self.is_bits:
            return BitsTile(product, logits, work)
        logits.copy_(product).mul_(LOG2E)
        if self.bias is not None:
            logits.add_(self.bias[vocab].to(logits.dtype), alpha=LOG2E)
        return BitsTile(logits, logits, work)


class BitsTile(NamedTuple):
    """Attributes:
    logits: [C, S] in bits; to be read only.
    base: [C, S] a buffer for shifted logits; `logits` may lie in it.
    work: [C, S] another buffer.
    """

    logits: Float[Tensor, "C S"]
    base: Float[Tensor, "C S"]
    work: Float[Tensor, "C S"]


class _Buffers:
    """The last large buffer of the CPU, handed on from step to step: a new one costs a page fault every 4 KB."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int, like: Tensor) -> Tensor:
        """[size] in the type and on the device of `like`, contents undefined."""
        if like.device.type == "cpu":
            free, self._free = self._free, []  # in one step: trainers may run in several threads
            if free and free[0].dtype == like.dtype and len(free[0]) >= size:
                return free[0]
        return like.new_empty(size)

    def give(self, buffer: Tensor) -> None:
        """Takes a buffer back; one is held at most. Accelerators have caches of their own."""
        if buffer.device.type == "cpu":
            self._free = [buffer]


_buffers = _Buffers()
