"""An order of comparisons in which neighbours share their prompt, so that a batch reads few distinct texts.

Where batches are padded, neighbours may also be of like length. Legend: B comparisons.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int
from torch.utils.data import Sampler

# Rows are sorted by length within so many batches: enough for hardly any padding, few enough for chance to choose the
# batches. transformers' number; and at least four such windows an epoch, so that small sets are mixed as well.
_WINDOW_BATCHES, _LEAST_WINDOWS = 50, 4


class PromptGroupedSampler(Sampler[int]):
    """Shuffles comparisons in blocks that share a prompt.

    The rows of each prompt are shuffled and cut into blocks of at most `block_size`; the blocks of all prompts are
    shuffled. With `block_size` equal to the batch size, a prompt with few rows stays whole and one with thousands does
    not fill hundreds of batches in a row.

    The order depends on seed and epoch alone: a resumed epoch that skips what was read continues exactly, whatever the
    number of processes that share a global batch.

    With `lengths`, the shuffled rows of a prompt, and then the blocks of all prompts, are cut into windows of some
    fifty batches. A window is sorted by length (a block's is that of its longest row) and cut into batches, and the
    batches are shuffled: neighbours stay neighbours, a batch holds like lengths, and which batches there are differs
    from epoch to epoch. Rows that fill no batch come last, of any length.

    Processes must take equally many steps. Where rows do not fill the last round of batches, copies of the epoch's
    last row do, as the negative number ~row: `ComparisonCollator` gives them no weight, and nothing remembers them.

    Args:
        prompt: [B] int64, the prompt of each comparison.
        block_size: rows, at least 1; the number of comparisons in a (global) batch.
        seed: with the epoch, decides the order.
        multiple_of: the number of rows and copies is a multiple of this; 1: no copies.
        lengths: [B] tokens of the longer text of each comparison; None: any lengths stand together.
    """

    def __init__(
        self,
        prompt: Int[np.ndarray, "B"],
        *,
        block_size: int,
        seed: int = 0,
        multiple_of: int = 1,
        lengths: Int[np.ndarray, "B"] | None = None,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1. Give the number of comparisons in a batch.")
        assert multiple_of >= 1
        order = np.argsort(prompt, kind="stable")
        borders = np.flatnonzero(np.diff(prompt[order])) + 1
        self._rows_of_prompt = np.split(order, borders)
        self._block_size = block_size
        self._seed = seed
        self._lengths = lengths
        self._epoch = 0
        self._copies = -len(prompt) % multiple_of
        self._length = len(prompt) + self._copies

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of epoch `epoch`."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        blocks: list[np.ndarray] = []
        for rows in self._rows_of_prompt:
            shuffled = rng.permutation(rows)
            if self._lengths is not None:
                shuffled = self._by_length(shuffled, self._lengths[shuffled], rng)
            blocks.extend(np.split(shuffled, range(self._block_size, len(rows), self._block_size)))
        mixed = [blocks[block] for block in rng.permutation(len(blocks))]
        order = np.concatenate(mixed) if mixed else np.zeros(0, dtype=np.int64)
        if self._lengths is not None:
            longest = [np.full(len(block), self._lengths[block].max()) for block in mixed]
            order = self._by_length(order, np.concatenate(longest) if mixed else order, rng)
        yield from order.tolist()
        yield from [~int(order[-1])] * self._copies if self._copies else []

    def _by_length(
        self, order: Int[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], rng: np.random.Generator
    ) -> Int[np.ndarray, "B"]:
        """The order with batches of like length; `lengths` stand in the order of `order`."""
        size = self._block_size
        whole = len(order) - len(order) % size
        window = size * max(1, min(_WINDOW_BATCHES, len(order) // (_LEAST_WINDOWS * size)))
        parts = []
        for start in range(0, whole, window):
            rows = slice(start, min(start + window, whole))
            batches = order[rows][np.argsort(lengths[rows], kind="stable")].reshape(-1, size)
            alike = lengths[rows].min() == lengths[rows].max()
            parts.append(batches.ravel() if alike else rng.permutation(batches).ravel())
        return np.concatenate([*parts, order[whole:]])
