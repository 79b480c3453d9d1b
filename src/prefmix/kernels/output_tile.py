"""One tile of output-head logits, in buffers that every tile of a pass uses again.

Legend: C tokens of a tile, S vocabulary entries of a tile, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.kernels.tiles import LOG2E, Tiles


class LogitTile(NamedTuple):
    """Attributes:
    logits: [C, S] logits in bits (natural logits times log2 e).
    work: [C, S] a second buffer, contents undefined.
    """

    logits: Float[Tensor, "C S"]
    work: Float[Tensor, "C S"]


class OutputTile(NamedTuple):
    """A head and the buffers of its tiles.

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        logits_buffer, work_buffer: flat, as large as the largest tile, in the accumulation type.
        product_buffer: the same in the type of the product, or None where that is the accumulation type.
    """

    weight: Tensor
    bias: Tensor | None
    logits_buffer: Tensor
    work_buffer: Tensor
    product_buffer: Tensor | None

    @classmethod
    def allocate(
        cls, weight: Tensor, bias: Tensor | None, num_tokens: int, tiles: Tiles, dtype: torch.dtype
    ) -> OutputTile:
        """Buffers for tiles of at most min(T, tiles.tokens) x min(V, tiles.vocab)."""
        size = min(tiles.tokens, num_tokens) * min(tiles.vocab, len(weight))
        product = weight.new_empty(size) if weight.dtype != dtype else None
        logits = torch.empty(size, dtype=dtype, device=weight.device)
        return cls(weight, bias, logits, torch.empty_like(logits), product)

    def logits(self, states: Float[Tensor, "C D"], vocab: slice, weight: Tensor | None = None) -> LogitTile:
        """Logits of the vocabulary entries `vocab`; overwrites the tile before.

        Args:
            states: [C, D] in the type of the product.
            vocab: a span of the vocabulary.
            weight: [V, D] another head, cast to the product's type tile by tile.
        """
        columns = (self.weight if weight is None else weight)[vocab].to(states.dtype).T
        shape = (len(states), columns.shape[1])
        size = shape[0] * shape[1]
        logits, work = self.logits_buffer[:size].view(shape), self.work_buffer[:size].view(shape)
        if self.product_buffer is None:
            torch.addmm(logits, states, columns, beta=0, alpha=LOG2E, out=logits)
        else:
            product = self.product_buffer[:size].view(shape)
            logits.copy_(torch.mm(states, columns, out=product)).mul_(LOG2E)
        if self.bias is not None:
            logits.add_(self.bias[vocab].to(logits.dtype), alpha=LOG2E)
        return LogitTile(logits, work)
