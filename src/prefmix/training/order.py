"""The order in which training reads comparisons."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.sampler import PromptGroupedSampler
from prefmix.training.config import MixtureConfig


def training_order(
    args: MixtureConfig, table: ComparisonTable, batch_size: int, processes: int
) -> PromptGroupedSampler:
    """An order that seed and epoch alone decide.

    Rows that share a prompt stand together where texts repeat (`group_texts`), and rows of like length where token ids
    are padded (`train_sampling_strategy`).

    Args:
        args: what to group by, and the seed.
        table: B comparisons.
        batch_size: comparisons of one forward pass of one process.
        processes: how many of them share a global batch.
    """
    together = args.group_texts
    if together is None:
        together = 2 * len(table) > 4 * len(table.texts)
    size = batch_size * processes
    return PromptGroupedSampler(
        table.prompt if together else np.arange(len(table)),
        block_size=size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        multiple_of=1 if processes == 1 or args.dataloader_drop_last else size,
        lengths=longer_text(table) if args.train_sampling_strategy == "group_by_length" else None,
    )


def longer_text(table: ComparisonTable) -> Int[np.ndarray, "B"]:
    """Tokens of the longest of a comparison's texts, prompt included."""
    texts = zip(table.texts.prompt_ids, table.texts.completion_ids, strict=True)
    lengths = np.array([len(prompt) + len(completion) for prompt, completion in texts], dtype=np.int64)
    if table.ranked is not None:
        starts = np.cumsum(table.ranked.size) - table.ranked.size
        return np.maximum.reduceat(lengths[table.ranked.texts], starts)
    return np.maximum(lengths[table.chosen], lengths[table.rejected])
