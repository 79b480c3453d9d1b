"""An order of comparisons in which neighbours share their prompt, so that a batch reads few distinct texts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class PromptGroupedSampler(Sampler[int]):
    """Shuffles comparisons in blocks that share a prompt.

    The rows of each prompt are shuffled and cut into blocks of at most `block_size`; the blocks of all prompts are
    shuffled. With `block_size` equal to the batch size, a prompt with few rows stays whole and one with thousands does
    not fill hundreds of batches in a row.

    The order depends on seed and epoch alone: a resumed epoch that skips what was read continues exactly, whatever the
    number of processes that share a global batch.

    Processes must take equally many steps. Where rows do not fill the last round of batches, copies of the epoch's
    last row do, as the negative number ~row: `ComparisonCollator` gives them no weight, and nothing remembers them.

    Args:
        prompt: [B] int64, the prompt of each comparison.
        block_size: rows, at least 1; the number of comparisons in a (global) batch.
        seed: with the epoch, decides the order.
        multiple_of: the number of rows and copies is a multiple of this; 1: no copies.
    """

    def __init__(self, prompt: np.ndarray, *, block_size: int, seed: int = 0, multiple_of: int = 1) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1. Give the number of comparisons in a batch.")
        assert multiple_of >= 1
        order = np.argsort(prompt, kind="stable")
        borders = np.flatnonzero(np.diff(prompt[order])) + 1
        self._rows_of_prompt = np.split(order, borders)
        self._block_size = block_size
        self._seed = seed
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
            blocks.extend(np.split(shuffled, range(self._block_size, len(rows), self._block_size)))
        last = -1
        for block in rng.permutation(len(blocks)):
            yield from blocks[block].tolist()
            last = int(blocks[block][-1])
        yield from [~last] * self._copies
