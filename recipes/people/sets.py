"""The three sets of real people, cut into what is trained on, what chooses, and what is scored.

Ratings (jokes, films) are cut by *thing*: of each person's rated things some are for training, some are scored, so no
single rating stands on both sides. Judgements of arguments are cut by judgement. The rows that choose ridge, K and
latent are the same for every seed and are never scored or trained on; only the rest is cut anew by each seed.

Legend: B comparisons, N texts, U users.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.convarg import load_convarg
from prefmix.data.datasets import read_named_file
from prefmix.data.ratings import rating_pairs

NAMES = ("convarg", "jester", "movielens")
PARTS = ("train", "validation", "test")
VALIDATION_SHARE, TEST_SHARE, NEW_SHARE = 0.15, 0.3, 0.2
# At most so many comparisons a person, drawn from ratings that stand in one part alone.
PAIRS = {"train": 100, "validation": 8, "test": 16}
PROMPTS = {"jester": "Tell me a joke.\n", "movielens": "Recommend a film.\n"}
# Held-out things of a person that a ranking needs.
MIN_RANKED = 10

Row = Mapping[str, Any]


class Rated(NamedTuple):
    """What one person rated and nobody trained on.

    Attributes:
        user: name.
        texts: the things.
        ratings: of each, in units of the set.
    """

    user: str
    texts: Sequence[str]
    ratings: np.ndarray


class Split(NamedTuple):
    """One cut of one set.

    Attributes:
        known: part -> rows of people who are trained on.
        new: part -> rows of people who are not: `train` is what is told of them, `test` what is scored.
        ranked: held-out ratings of known people, for jokes and films.
    """

    known: dict[str, list[Row]]
    new: dict[str, list[Row]]
    ranked: list[Rated]


class PeopleSet(NamedTuple):
    """A set before it is cut.

    Attributes:
        name: convarg, jester or movielens.
        min_gap: smallest difference of two ratings that makes a comparison; 0 for judgements.
        rows: of judgements.
        ratings: user -> (thing, rating).
        texts: thing -> text.
    """

    name: str
    min_gap: float
    rows: list[Row]
    ratings: Mapping[str, list[tuple[str, float]]]
    texts: Mapping[str, str]

    def users(self) -> list[str]:
        """Everybody, sorted."""
        return sorted(self.ratings) if self.ratings else sorted({row["user"] for row in self.rows})

    def catalogue(self) -> list[Row]:
        """Few rows that hold every (prompt, text) once or twice: what the language model has to read."""
        by_prompt: dict[str, dict[str, None]] = defaultdict(dict)
        for row in self.rows:
            by_prompt[row["prompt"]] |= {row["chosen"]: None, row["rejected"]: None}
        if self.texts:
            by_prompt[PROMPTS[self.name]] = dict.fromkeys(self.texts.values())
        found = []
        for prompt, texts in by_prompt.items():
            names = list(texts)
            names += names[:1] if len(names) % 2 else []
            found += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in zip(names[::2], names[1::2])]
        return [row for row in found if row["chosen"] != row["rejected"]]


def load_set(name: str, *, max_users: int | None = None) -> PeopleSet:
    """Reads a set.

    Args:
        name: convarg, jester or movielens.
        max_users: keep so many people, drawn once and for all; None: everybody who qualifies.
    """
    if name == "convarg":
        rows: list[Row] = [row for row in load_convarg(min_judgements=20) if not row["tie"]]
        return _fewer(PeopleSet(name, 0.0, rows, {}, {}), max_users)
    thing, gap = {"jester": ("joke", 4.0), "movielens": ("movie", 2.0)}[name]
    ratings: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row in read_named_file(name, "ratings"):
        ratings[row["user"]].append((row[thing], float(row["rating"])))
    if name == "jester":
        texts = {row["id"]: row["text"] for row in read_named_file(name, "jokes")}
    else:
        films = read_named_file(name, "movies")
        texts = {film["title"]: f"{film['title']}: {', '.join(film['genres']).lower()}" for film in films}
    return _fewer(PeopleSet(name, gap, [], dict(ratings), texts), max_users)


def cut(people: PeopleSet, seed: int) -> Split:
    """Cuts a set by a seed; validation rows are the same under every seed."""
    users = people.users()
    shuffled = np.random.default_rng([seed, 1]).permutation(len(users))
    new = {users[index] for index in shuffled[: round(NEW_SHARE * len(users))]}
    parts = _cut_judgements(people.rows, seed) if people.rows else _cut_ratings(people, seed)
    known = {part: [row for row in parts[part] if row["user"] not in new] for part in PARTS}
    fresh = {part: [row for row in parts[part] if row["user"] in new] for part in ("train", "test")}
    return Split(known, fresh, _ranked(people, seed, new))


def shuffle_users(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same rows with their authors drawn from a hat; everybody keeps as many rows."""
    names = [row["user"] for row in rows]
    order = np.random.default_rng([seed, 3]).permutation(len(rows))
    return [{**row, "user": names[place]} for row, place in zip(rows, order)]


def _fewer(people: PeopleSet, max_users: int | None) -> PeopleSet:
    users = people.users()
    if max_users is None or len(users) <= max_users:
        return people
    kept = {users[index] for index in np.random.default_rng(7).permutation(len(users))[:max_users]}
    return people._replace(
        rows=[row for row in people.rows if row["user"] in kept],
        ratings={user: rated for user, rated in people.ratings.items() if user in kept},
    )


def _parts_of(count: int, key: Sequence[int], seed: int) -> np.ndarray:
    """[count] 0, 1, 2 for train, validation, test; the validation places depend on `key` alone."""
    place = np.random.default_rng([*key, 0]).permutation(count)
    validation = round(VALIDATION_SHARE * count)
    rest = np.random.default_rng([*key, seed, 1]).permutation(place[validation:])
    part = np.zeros(count, dtype=int)
    part[place[:validation]] = 1
    part[rest[: round(TEST_SHARE * count)]] = 2
    return part


def _by_user(people: PeopleSet, seed: int) -> dict[str, np.ndarray]:
    return {
        user: _parts_of(len(people.ratings[user]), (11, index), seed)
        for index, user in enumerate(sorted(people.ratings))
    }


def _cut_ratings(people: PeopleSet, seed: int) -> dict[str, list[Row]]:
    where, found = _by_user(people, seed), {}
    for number, part in enumerate(PARTS):
        ratings = (
            (user, thing, rating)
            for user in sorted(people.ratings)
            for (thing, rating), place in zip(people.ratings[user], where[user])
            if place == number
        )
        # The draw of validation pairs must not depend on the seed either.
        draw = 0 if part == "validation" else 10 * seed + number
        found[part] = rating_pairs(
            ratings, people.texts, prompt=PROMPTS[people.name], pairs_per_user=PAIRS[part], min_gap=people.min_gap,
            seed=draw,
        )  # fmt: skip
    return found


def _cut_judgements(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    by_user: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_user[row["user"]].append(row)
    found: dict[str, list[Row]] = {part: [] for part in PARTS}
    for index, user in enumerate(sorted(by_user)):
        for row, place in zip(by_user[user], _parts_of(len(by_user[user]), (13, index), seed)):
            found[PARTS[place]].append(row)
    # The file goes debate by debate: the first judgements told of a person must not be all of one.
    rng = np.random.default_rng([seed, 4])
    return {part: [kept[index] for index in rng.permutation(len(kept))] for part, kept in found.items()}


def _ranked(people: PeopleSet, seed: int, new: set[str]) -> list[Rated]:
    found = []
    for user, where in _by_user(people, seed).items():
        held_out = [entry for entry, place in zip(people.ratings[user], where) if place == 2]
        if user not in new and len(held_out) >= MIN_RANKED:
            texts = [people.texts[thing] for thing, _ in held_out]
            found.append(Rated(user, texts, np.array([rating for _, rating in held_out])))
    return found
