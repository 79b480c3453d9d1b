"""Ratings as comparisons: of two things that one person rated clearly apart, the better one is preferred."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def rating_pairs(
    ratings: Iterable[tuple[str, str, float]],
    texts: Mapping[str, str],
    *,
    prompt: str,
    pairs_per_user: int,
    min_gap: float,
    seed: int,
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Draws comparisons from each person's ratings, without repeating one.

    Args:
        ratings: (user, item, rating).
        texts: item -> response text.
        prompt: the prompt of every row.
        pairs_per_user: at most so many rows for each person.
        min_gap: smallest difference of the two ratings, in units of the rating.
        seed: decides which pairs are drawn.
        metadata: user -> `user_*` fields.

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, `user`, and `metadata` where given.
    """
    by_user: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for user, item, rating in ratings:
        by_user[user].append((item, rating))
    rng = np.random.default_rng(seed)
    rows = []
    for user, rated in by_user.items():
        values = np.array([rating for _, rating in rated])
        better, worse = np.nonzero(values[:, None] - values[None, :] >= min_gap)
        drawn = rng.permutation(len(better))[:pairs_per_user]
        for chosen, rejected in zip(better[drawn], worse[drawn], strict=True):
            row: dict[str, Any] = {
                "prompt": prompt,
                "chosen": texts[rated[chosen][0]],
                "rejected": texts[rated[rejected][0]],
                "user": user,
            }
            if metadata is not None:
                row["metadata"] = dict(metadata.get(user, {}))
            rows.append(row)
    return rows
