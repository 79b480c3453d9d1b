"""Two kinds of reviews with opposite tastes, and people who belong to one of them without saying so in the prompt.

Every review is used once: as the opening that a prompt quotes, or as the end of a response. Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.datasets import read_named_file

DOMAINS = ("movies", "books")
# Who reads about films wants praise, who reads about books wants blame: no single policy can please both.
PREFERRED = {"movies": "pos", "books": "neg"}
CLUBS = {
    "movies": ("film club", "cinema society", "actors' guild"),
    "books": ("reading circle", "library friends", "poetry evening"),
}
KINDS = {"movies": "film", "books": "book"}
NEUTRAL_PROMPT = "Write a review.\n"

Row = dict[str, Any]


class Sizes(NamedTuple):
    """How many rows to draw.

    Attributes:
        train, validation, test: comparisons of both domains together, even numbers.
        people: of the metadata gate, in training and (others) in test; multiples of 6.
        train_per_person, test_per_person: comparisons of each.
        opening_words: of a review, quoted in the prompt.
        end_words: of a review, as a response: the verdict stands at the end.
        named: whether a prompt also says if it is about a film or a book, or leaves that to the quotation.
    """

    train: int
    validation: int
    test: int
    people: int
    train_per_person: int = 8
    test_per_person: int = 6
    opening_words: int = 12
    end_words: int = 20
    named: bool = True


class Rows(NamedTuple):
    """`group` is the domain (or a person's taste): it is reported by, and read by no mixture.

    Attributes:
        train, validation, test: a prompt quotes a review of its domain; nobody is named.
        people_train: the neutral prompt, users with metadata.
        people_test: the same of other users with clubs of the same names.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    people_train: list[Row]
    people_test: list[Row]


def draw_rows(sizes: Sizes, seed: int) -> Rows:
    """Rows over reviews that no other row uses.

    Raises:
        ValueError: the reviews are too few for these sizes, or are not found (see PREFMIX_DATA).
    """
    rng = np.random.default_rng(seed)
    reviews = _reviews(sizes, rng)
    by_domain = {domain: _domain_rows(domain, reviews, sizes) for domain in DOMAINS}
    parts = []
    for count in (sizes.train, sizes.validation, sizes.test):
        rows = [next(by_domain[DOMAINS[i % 2]]) for i in range(count)]
        parts.append([rows[i] for i in rng.permutation(count)])
    people = [
        _people(f"{part}{{:02d}}", sizes.people, each, reviews, sizes, rng)
        for part, each in (("known", sizes.train_per_person), ("new", sizes.test_per_person))
    ]
    return Rows(*parts, *people)


def _reviews(sizes: Sizes, rng: np.random.Generator) -> dict[tuple[str, str], list[list[str]]]:
    """(domain, label) -> the words of its reviews in random order; `dvd` is what people are asked about."""
    found: dict[tuple[str, str], list[list[str]]] = {}
    shortest = max(sizes.opening_words, sizes.end_words)
    for file in ("movies_train", "books_dvd"):
        for row in read_named_file("reviews", file):
            words = row["text"].split()
            if len(words) >= shortest and row["label"] in ("pos", "neg"):
                found.setdefault((row["domain"], row["label"]), []).append(words)
    return {key: [texts[i] for i in rng.permutation(len(texts))] for key, texts in found.items()}


def _take(reviews: dict[tuple[str, str], list[list[str]]], domain: str, label: str) -> list[str]:
    try:
        return reviews[domain, label].pop()
    except (KeyError, IndexError):
        raise ValueError(f"too few {label} reviews of {domain} for these sizes; ask for fewer rows") from None


def _domain_rows(domain: str, reviews: dict[tuple[str, str], list[list[str]]], sizes: Sizes) -> Iterator[Row]:
    index = 0
    while True:
        quoted = " ".join(_take(reviews, domain, ("pos", "neg")[index % 2])[: sizes.opening_words])
        prompt = f"{quoted} ...\nAnother review:\n"
        if sizes.named:
            kind = KINDS[domain]
            prompt = f"{kind.title()} review. {quoted} ...\nAnother {kind} review:\n"
        yield _comparison(domain, domain, prompt, reviews, sizes)
        index += 1


def _comparison(
    domain: str, taste: str, prompt: str, reviews: dict[tuple[str, str], list[list[str]]], sizes: Sizes
) -> Row:
    """One row on the ends of two reviews of a domain, judged by a taste."""
    ends = {label: " ".join(_take(reviews, domain, label)[-sizes.end_words :]) for label in ("pos", "neg")}
    chosen = PREFERRED[taste]
    rejected = "neg" if chosen == "pos" else "pos"
    return {"prompt": prompt, "chosen": ends[chosen], "rejected": ends[rejected], "group": taste}


def _people(
    name: str,
    count: int,
    each: int,
    reviews: dict[tuple[str, str], list[list[str]]],
    sizes: Sizes,
    rng: np.random.Generator,
) -> list[Row]:
    clubs: Sequence[tuple[str, str]] = [(taste, club) for taste in DOMAINS for club in CLUBS[taste]]
    rows = []
    for person in range(count):
        taste, club = clubs[person % len(clubs)]
        metadata = {"user_club": club, "user_age": int(rng.integers(18, 80))}
        for _ in range(each):
            row = _comparison("dvd", taste, NEUTRAL_PROMPT, reviews, sizes)
            rows.append(row | {"user": name.format(person), "metadata": metadata})
    return rows
