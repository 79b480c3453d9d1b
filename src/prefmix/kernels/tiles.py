"""How the [tokens, vocabulary] plane is cut so that a tile of logits stays in the processor's cache.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

# Everything inside the kernels is in bits: exp2 is three times faster than exp on a CPU, and never slower elsewhere.
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


# 2,730 tokens of 49,152 float32 logits, twice as many in bfloat16; a batch of four pairs needs a fraction.
_KEPT_BYTES = 512 * 2**20


class Tiles(NamedTuple):
    """Largest tile of logits that a kernel holds at once, and what low-rank heads may keep.

    Attributes:
        tokens: rows of a tile; each chunk of tokens reads the output head from memory once.
        vocab: columns of a tile.
        kept_bytes: base logits, shared by all experts, that a forward may keep for its backward; for tokens beyond
            it they are computed twice.
    """

    tokens: int
    vocab: int
    kept_bytes: int = _KEPT_BYTES


# CPU: two float32 tiles of 1024 x 1024 take 8 MB (last-level cache), and a thousand rows make the read of the head
# from memory negligible. GPU: large enough that launches do not dominate.
_TILES_BY_DEVICE = {"cpu": Tiles(1024, 1024), "cuda": Tiles(2048, 8192)}


def default_tiles(device: torch.device) -> Tiles:
    """The measured tile of a device type."""
    return _TILES_BY_DEVICE.get(device.type, Tiles(1024, 4096))


def spans(total: int, largest: int) -> Iterator[slice]:
    """Cuts 0..total into the fewest pieces of at most `largest`, as equal as possible (no small rest)."""
    if total == 0:
        return
    size = math.ceil(total / math.ceil(total / largest))
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the softmax and of every sum: float32, or float64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)
