"""The preferences as rows of text, and people of two camps who give theirs under a name.

Legend: B rows, U users.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from preferences import PAIRS, World

# Three responses to each prompt, in the order A, B, C of `preferences`.
TRIADS = (
    ("Which one do you play?\n", ("The rock.", "The scissors.", "The paper.")),
    ("Which pet do you want?\n", ("A little dog.", "A big cat.", "A red bird.")),
    ("What shall we eat today?\n", ("The hot soup.", "The sweet cake.", "The fresh fish.")),
)
# Rewards of A, B and C in the first camp are log 9, 0 and - log 9, in the second the reverse.
CAMP_CHANCES = {(0, 1): 9 / 10, (1, 2): 9 / 10, (0, 2): 81 / 82}

Row = dict[str, Any]


def population_rows(world: World) -> list[Row]:
    """Both answers to each pair of each prompt, weighted by how often they are given: the whole population."""
    return [
        {"prompt": prompt, "chosen": texts[i], "rejected": texts[j], "weight": float(chance)}
        for prompt, texts in TRIADS
        for (a, b), first in zip(PAIRS, world.chance, strict=True)
        for i, j, chance in ((a, b, first), (b, a, 1 - first))
    ]


def camp_rows(num_users: int, repetitions: int, seed: int) -> list[Row]:
    """Sampled answers of two camps of equal size and opposite order; user u is of camp u mod 2."""
    rng = np.random.default_rng(seed)
    return [
        _answer(prompt, texts, pair, user, rng.random() < chance)
        for user in range(num_users)
        for prompt, texts in TRIADS
        for pair, chance in CAMP_CHANCES.items()
        for _ in range(repetitions)
    ]


def camp_expectation(num_users: int) -> list[Row]:
    """Both answers of every user to every pair, weighted by their true probability."""
    return [
        _answer(prompt, texts, pair, user, typical) | {"weight": chance if typical else 1 - chance}
        for user in range(num_users)
        for prompt, texts in TRIADS
        for pair, chance in CAMP_CHANCES.items()
        for typical in (True, False)
    ]


def camp_floor() -> float:
    """Mean entropy of an answer of somebody whose camp is known, nats."""
    p = np.array(list(CAMP_CHANCES.values()))
    return float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean())


def _answer(prompt: str, texts: tuple[str, ...], pair: tuple[int, int], user: int, typical: bool) -> Row:
    i, j = pair if typical == (user % 2 == 0) else pair[::-1]
    return {"prompt": prompt, "chosen": texts[i], "rejected": texts[j], "user": f"u{user:03d}"}
