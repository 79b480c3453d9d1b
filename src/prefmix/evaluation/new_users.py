"""Which comparisons of a person are context and which are scored: no comparison stands in both.

Legend: B comparisons, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ContextSplit(NamedTuple):
    """Context and scored rows for a curve over the number of context comparisons.

    Attributes:
        sizes: context sizes n that enough people can afford, increasing.
        rank: [B] place of a row in its person's shuffled order, 0-based; -1 where the person has too few rows.
            The context of size n is the rows with 0 <= rank < n.
        scored: [B] bool, rows that are scored, the same for every n: rank >= the largest n.
    """

    sizes: tuple[int, ...]
    rank: np.ndarray
    scored: np.ndarray


def split_context(user: np.ndarray, sizes: Sequence[int], seed: int = 0) -> ContextSplit:
    """Takes the first n of each person's comparisons (in a seeded order) as context and keeps the rest for scoring.

    The largest n is the largest requested size that at least half of the people can give while one comparison is left
    over. People with fewer are left out, so that one set of rows is scored for every n.

    Args:
        user: [B] person of each row, -1 where unknown (such rows are left out).
        sizes: requested context sizes.
        seed: of the order.
    """
    people, count = np.unique(user[user >= 0], return_counts=True)
    order = np.random.default_rng(seed).permutation(len(user))
    rank = np.full(len(user), -1)
    by_user = order[np.argsort(user[order], kind="stable")]
    by_user = by_user[user[by_user] >= 0]
    rank[by_user] = np.arange(len(by_user)) - np.repeat(np.cumsum(count) - count, count)
    affordable = tuple(sorted(n for n in set(sizes) if len(people) and 2 * (count > n).sum() >= len(people)))
    largest = max(affordable, default=0)
    enough = np.isin(user, people[count > largest])
    rank = np.where(enough, rank, -1)
    return ContextSplit(affordable, rank, rank >= largest)
