"""Films that people rated clearly apart: all films are dealt, so held-out pairs are over films nobody trained on."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from pairs import Row, Sizes, Splits, deal, deal_rows

from prefmix.data.datasets import load_named, read_named_file


def load_films(tokenizer: Any, sizes: Sizes, seed: int) -> Splits:
    """Pairs of films; `seed` is of the split and the order of rows."""
    rng = np.random.default_rng(seed)
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in load_named("movielens")]
    part_of = deal(sorted({row[name] for row in rows for name in ("chosen", "rejected")}), rng)
    return deal_rows(rows, part_of, tokenizer, sizes, rng)


def mean_ratings() -> dict[str, float]:
    """Text of a film -> its mean rating by everybody: more than any model here can know of a new film."""
    texts = {film["title"]: f"{film['title']}: {', '.join(film['genres']).lower()}" for film in _records("movies")}
    ratings = defaultdict(list)
    for record in _records("ratings"):
        ratings[texts[record["movie"]]].append(record["rating"])
    return {text: float(np.mean(values)) for text, values in ratings.items()}


def _records(file: str) -> list[Row]:
    return read_named_file("movielens", file)
