"""Film reviews in five disjoint parts: for reward models, the reference, training, validation and evaluation.

No film has reviews in two of the parts.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.datasets import read_named_file

PARTS = {"rewards": (0, 45), "reference": (45, 75), "training": (75, 95), "validation": (95, 100)}


class Reviews(NamedTuple):
    """Who reads which reviews.

    Attributes:
        rewards: text and whether it praises; sentiment and informativeness are fitted on them.
        other_domain: reviews of books and DVDs, for a second judge of sentiment that nothing is trained against.
        reference: texts that the reference is fine-tuned on.
        training, validation, evaluation: texts whose beginnings are prompts.
    """

    rewards: list[tuple[str, bool]]
    other_domain: list[tuple[str, bool]]
    reference: list[str]
    training: list[str]
    validation: list[str]
    evaluation: list[str]


def load_reviews() -> Reviews:
    """All parts: four by a hash of the film from IMDb's training reviews, evaluation from its test reviews."""
    films = read_named_file("reviews", "movies_train")
    parts: dict[str, list[dict[str, Any]]] = {
        name: [row for row in films if low <= zlib.crc32(str(row["item"]).encode()) % 100 < high]
        for name, (low, high) in PARTS.items()
    }
    known = {row["item"] for row in films}
    evaluation = [row for row in read_named_file("reviews", "movies_test") if row["item"] not in known]
    return Reviews(
        rewards=[(row["text"], row["label"] == "pos") for row in parts["rewards"]],
        other_domain=[(row["text"], row["label"] == "pos") for row in read_named_file("reviews", "books_dvd")],
        reference=[row["text"] for row in parts["reference"]],
        training=[row["text"] for row in parts["training"]],
        validation=[row["text"] for row in parts["validation"]],
        evaluation=[row["text"] for row in evaluation],
    )


def prefixes(texts: Sequence[str], count: int, rng: np.random.Generator, num_words: tuple[int, int]) -> list[str]:
    """Beginnings of `count` different reviews, cut after some number of words within `num_words`.

    Raises:
        ValueError: there are not so many reviews.
    """
    longest = num_words[1]
    fitting = list(dict.fromkeys(" ".join(t.split()) for t in texts if len(t.split()) > 2 * longest))
    if len(fitting) < count:
        raise ValueError(f"{count} prompts asked for, {len(fitting)} reviews are long enough; ask for fewer")
    found: dict[str, None] = {}
    for index in rng.permutation(len(fitting)):
        found[" ".join(fitting[index].split()[: int(rng.integers(num_words[0], longest + 1))])] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"{count} prompts asked for, {len(found)} reviews begin differently; ask for fewer")
