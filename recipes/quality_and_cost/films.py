"""Pairs of films that people rated clearly apart, split so that held-out pairs are over films that nobody trained on.

Legend: B pairs.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.datasets import load_named, read_named_file
from prefmix.data.tokenization import tokenize_rows

SHARES = {"training": 0.45, "validation": 0.2, "test": 0.35}  # of all films

Row = dict[str, Any]


class Pairs(NamedTuple):
    """One person's preference between two films, each a row.

    Attributes:
        table: B comparisons.
        films: [B, 2] index of the preferred and of the other film.
        rows: the same in text.
    """

    table: ComparisonTable
    films: np.ndarray
    rows: list[Row]


class Films(NamedTuple):
    """The rows of all arms.

    Attributes:
        few: training rows of every arm.
        many: more rows over the same part of the films, for heads, which can afford them.
        validation: chooses learning rates.
        test: is reported.
    """

    few: list[Row]
    many: list[Row]
    validation: Pairs
    test: Pairs


def load_films(tokenizer: Any, *, training_pairs: int, more_pairs: int, max_held_out: int | None, seed: int) -> Films:
    """Deals all films to three parts, and keeps the pairs whose two films fell into the same part.

    Args:
        tokenizer: of the base model.
        training_pairs: rows of every arm.
        more_pairs: rows where heads train on more of them; the first ones are those of every arm.
        max_held_out: at most so many held-out rows of each kind (tests); None: all.
        seed: of the split and the order of rows.
    """
    rng = np.random.default_rng(seed)
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in load_named("movielens")]
    part_of = split_films(rows, rng)
    parts: dict[str, list[Row]] = {name: [] for name in SHARES}
    for row in (rows[i] for i in rng.permutation(len(rows)).tolist()):
        if part_of[row["chosen"]] == part_of[row["rejected"]]:
            parts[part_of[row["chosen"]]].append(row)
    return Films(
        parts["training"][:training_pairs],
        parts["training"][:more_pairs],
        _scored(parts["validation"][:max_held_out], tokenizer),
        _scored(parts["test"][:max_held_out], tokenizer),
    )


def split_films(rows: list[Row], rng: np.random.Generator) -> dict[str, str]:
    """The part of each film."""
    films = sorted({row[name] for row in rows for name in ("chosen", "rejected")})
    ends = np.round(np.cumsum(list(SHARES.values())) * len(films)).astype(int)
    place = np.searchsorted(ends, np.arange(len(films)), side="right")
    return {films[film]: list(SHARES)[place[i]] for i, film in enumerate(rng.permutation(len(films)).tolist())}


def mean_ratings() -> dict[str, float]:
    """Text of a film -> its mean rating by everybody: more than any model here can know of a new film."""
    texts = {film["title"]: f"{film['title']}: {', '.join(film['genres']).lower()}" for film in _records("movies")}
    ratings = defaultdict(list)
    for record in _records("ratings"):
        ratings[texts[record["movie"]]].append(record["rating"])
    return {text: float(np.mean(values)) for text, values in ratings.items()}


def _records(file: str) -> list[Row]:
    return read_named_file("movielens", file)


def _scored(rows: list[Row], tokenizer: Any) -> Pairs:
    table = tokenize_rows(rows, tokenizer, progress=False)
    assert len(table) == len(rows), "a row was dropped"
    films = {film: i for i, film in enumerate(sorted({row[name] for row in rows for name in ("chosen", "rejected")}))}
    return Pairs(table, np.array([[films[row["chosen"]], films[row["rejected"]]] for row in rows]), rows)
