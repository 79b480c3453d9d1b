"""Preference pairs over items (films, arguments), dealt so that held-out pairs are over items that nobody trained on.

Legend: B pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.tokenization import tokenize_rows

SHARES = {"training": 0.45, "validation": 0.2, "test": 0.35}  # of all items, or of what they belong to

Row = dict[str, Any]


class Pairs(NamedTuple):
    """One person's preference between two items, each a row.

    Attributes:
        table: B comparisons.
        items: [B, 2] index of the preferred and of the other item.
        rows: the same in text.
    """

    table: ComparisonTable
    items: np.ndarray
    rows: list[Row]


class Splits(NamedTuple):
    """The rows of all arms.

    Attributes:
        few: training rows of every arm.
        many: more rows over the same part of the items, for heads, which can afford them.
        validation: chooses learning rates.
        test: is reported.
    """

    few: list[Row]
    many: list[Row]
    validation: Pairs
    test: Pairs


class Sizes(NamedTuple):
    """How many rows.

    Attributes:
        training_pairs: of every arm.
        more_pairs: where heads train on more of them; the first ones are those of every arm.
        max_held_out: at most so many held-out rows of each kind; None: all.
    """

    training_pairs: int
    more_pairs: int
    max_held_out: int | None


def deal_rows(
    rows: list[Row], part_of: Mapping[str, str], tokenizer: Any, sizes: Sizes, rng: np.random.Generator
) -> Splits:
    """Keeps the pairs whose two texts fell into the same part, in a random order.

    Args:
        rows: `prompt`, `chosen`, `rejected`.
        part_of: text -> name of its part.
        tokenizer: of the base model.
        sizes: how many rows.
        rng: of the order.
    """
    parts: dict[str, list[Row]] = {name: [] for name in SHARES}
    for row in (rows[i] for i in rng.permutation(len(rows)).tolist()):
        if part_of[row["chosen"]] == part_of[row["rejected"]]:
            parts[part_of[row["chosen"]]].append(row)
    return Splits(
        parts["training"][: sizes.training_pairs],
        parts["training"][: sizes.more_pairs],
        _scored(parts["validation"][: sizes.max_held_out], tokenizer),
        _scored(parts["test"][: sizes.max_held_out], tokenizer),
    )


def deal(things: list[str], rng: np.random.Generator) -> dict[str, str]:
    """The part of each thing."""
    ends = np.round(np.cumsum(list(SHARES.values())) * len(things)).astype(int)
    place = np.searchsorted(ends, np.arange(len(things)), side="right")
    return {things[thing]: list(SHARES)[place[i]] for i, thing in enumerate(rng.permutation(len(things)).tolist())}


def _scored(rows: list[Row], tokenizer: Any) -> Pairs:
    table = tokenize_rows(rows, tokenizer, progress=False)
    assert len(table) == len(rows), "a row was dropped"
    items = {text: i for i, text in enumerate(sorted({row[name] for row in rows for name in ("chosen", "rejected")}))}
    return Pairs(table, np.array([[items[row["chosen"]], items[row["rejected"]]] for row in rows]), rows)
