"""Planted groups over real texts: users whose true group, and so the right answer, is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

TEXT_SHARES = (0.6, 0.15, 0.25)  # of every side's texts: training, validation, test

TextsBySide = Mapping[str, Sequence[str]]


class PlantedSplits(NamedTuple):
    """Rows with `prompt`, `chosen`, `rejected`, `user`, `group`; no text stands in two of the first three.

    Attributes:
        train: comparisons of the users over the training texts.
        validation: comparisons of the same users over other texts.
        test: comparisons of the same users over the texts that are left.
        new_users: comparisons of other users over the test texts.
    """

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    new_users: list[dict[str, Any]]


def planted_groups(
    texts_by_side: Mapping[str, TextsBySide],
    *,
    num_users: int,
    comparisons_per_user: int,
    preferences: Mapping[str, Sequence[float]],
    seed: int,
    noise: float = 0.0,
    validation_per_user: int | None = None,
    test_per_user: int | None = None,
    num_new_users: int = 0,
) -> PlantedSplits:
    """Invents users who each belong to one of G groups and judge real texts by the taste of their group.

    A user compares one text from each of two sides and prefers the side that the group values more. Only pairs of
    sides on which every group has a preference are drawn, alike for all, so that what a user was asked says nothing
    about the group. Groups are equally large (within one user).

    Args:
        texts_by_side: prompt -> side -> texts; every prompt has the same number S of sides, in the same order.
        num_users: U; named `u000` and so on.
        comparisons_per_user: training rows of each user.
        preferences: group name -> [S] value of each side; larger is preferred.
        seed: decides the texts of each split, the users' groups, and every draw.
        noise: probability, below 0.5, that a user answers against the group's taste, in all splits.
        validation_per_user: rows of each user; a quarter of `comparisons_per_user`, at least 2, where None.
        test_per_user: rows of each user and of each new user; `comparisons_per_user` where None.
        num_new_users: users who stand in no other split.

    Raises:
        ValueError: naming the argument that cannot be met.
    """
    pairs = _side_pairs(texts_by_side, preferences)
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise={noise} must be at least 0 and below 0.5: at 0.5 the answers say nothing.")
    rng = np.random.default_rng(seed)
    splits = _split_texts(texts_by_side, rng)
    digits = max(3, len(str(num_users + num_new_users - 1)))
    names = [f"u{index:0{digits}d}" for index in range(num_users + num_new_users)]
    groups = list(preferences)
    group_of = dict(zip(names, _balanced(groups, num_users, rng) + _balanced(groups, num_new_users, rng), strict=True))
    known, new = names[:num_users], names[num_users:]
    validation_per_user = max(2, comparisons_per_user // 4) if validation_per_user is None else validation_per_user
    test_per_user = comparisons_per_user if test_per_user is None else test_per_user
    draw = _Judge(pairs, preferences, group_of, noise, rng)
    return PlantedSplits(
        train=draw.rows(splits[0], known, comparisons_per_user),
        validation=draw.rows(splits[1], known, validation_per_user),
        test=draw.rows(splits[2], known, test_per_user),
        new_users=draw.rows(splits[2], new, test_per_user),
    )


class _Judge:
    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        preferences: Mapping[str, Sequence[float]],
        group_of: Mapping[str, str],
        noise: float,
        rng: np.random.Generator,
    ) -> None:
        self._pairs, self._preferences, self._group_of, self._noise, self._rng = (
            pairs,
            preferences,
            group_of,
            noise,
            rng,
        )

    def rows(self, texts: Mapping[str, TextsBySide], users: Sequence[str], count: int) -> list[dict[str, Any]]:
        """`count` comparisons of each user; a user sees no pair of texts twice while there are others."""
        prompts = list(texts)
        found = []
        for user in users:
            seen: set[tuple[str, str]] = set()
            for _ in range(count):
                row = self._row(texts, prompts, user)
                for _ in range(20):
                    if (row["chosen"], row["rejected"]) not in seen:
                        break
                    row = self._row(texts, prompts, user)
                seen |= {(row["chosen"], row["rejected"]), (row["rejected"], row["chosen"])}
                found.append(row)
        return found

    def _row(self, texts: Mapping[str, TextsBySide], prompts: Sequence[str], user: str) -> dict[str, Any]:
        rng, group = self._rng, self._group_of[user]
        prompt = prompts[int(rng.integers(len(prompts)))]
        first, second = self._pairs[int(rng.integers(len(self._pairs)))]
        values = self._preferences[group]
        if (values[first] > values[second]) == (rng.random() < self._noise):
            first, second = second, first
        sides = list(texts[prompt].values())
        chosen, rejected = (side[int(rng.integers(len(side)))] for side in (sides[first], sides[second]))
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user": user, "group": group}


def _side_pairs(
    texts_by_side: Mapping[str, TextsBySide], preferences: Mapping[str, Sequence[float]]
) -> list[tuple[int, int]]:
    counts = {len(sides) for sides in texts_by_side.values()} | {len(values) for values in preferences.values()}
    if len(counts) != 1 or not preferences:
        raise ValueError(
            f"texts_by_side and preferences must agree in the number of sides, and name at least one group; found "
            f"sides {sorted(counts)} and {len(preferences)} groups. Give one value for each side to every group."
        )
    pairs = [
        (a, b)
        for a, b in combinations(range(counts.pop()), 2)
        if all(values[a] != values[b] for values in preferences.values())
    ]
    if not pairs:
        raise ValueError(
            f"preferences={dict(preferences)!r} have no two sides on which every group has a preference. Give "
            "different values to at least two sides, the same two in all groups."
        )
    return pairs


def _split_texts(
    texts_by_side: Mapping[str, TextsBySide], rng: np.random.Generator
) -> list[dict[str, dict[str, list[str]]]]:
    """Training, validation and test texts of every side; a text on two sides of one prompt is left out."""
    splits: list[dict[str, dict[str, list[str]]]] = [{}, {}, {}]
    for prompt, sides in texts_by_side.items():
        count = Counter(text for texts in sides.values() for text in set(texts))
        for side, texts in sides.items():
            distinct = [text for text in dict.fromkeys(texts) if count[text] == 1]
            order = [distinct[i] for i in rng.permutation(len(distinct))]
            first = round(TEXT_SHARES[0] * len(order))
            second = round((TEXT_SHARES[0] + TEXT_SHARES[1]) * len(order))
            parts = (order[:first], order[first:second], order[second:])
            if not all(parts):
                raise ValueError(
                    f"side {side!r} has {len(distinct)} distinct texts, too few to part them into training, validation "
                    "and test. Give at least 6."
                )
            for split, part in zip(splits, parts, strict=True):
                split.setdefault(prompt, {})[side] = part
    return splits


def _balanced(groups: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Equally large groups in random order."""
    return [groups[i % len(groups)] for i in rng.permutation(count)]
