"""Rows of one data set parted into training, validation, test and new people, by a seed. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from prefmix.experiments.compare_settings import SplitBy

Rows = Sequence[Mapping[str, Any]]
_PARTS = ("train", "validation", "test")


class RowSplit(NamedTuple):
    """Indices of rows; no row stands in two parts.

    Attributes:
        train: what arms learn from.
        validation: chooses options and epochs.
        test: reported; people whom training knows.
        new_users: reported; people who stand in no other part.
        dropped: rows whose two texts fell into different parts (`text`), or of new people over texts that others learn
            from (`text`, `prompt`).
    """

    train: list[int]
    validation: list[int]
    test: list[int]
    new_users: list[int]
    dropped: int


def split_rows(
    rows: Rows,
    *,
    by: SplitBy = "row",
    validation_share: float = 0.15,
    test_share: float = 0.25,
    new_user_share: float = 0.15,
    seed: int = 0,
) -> RowSplit:
    """Parts rows: first people, then each known person's rows, or the texts or prompts of all rows.

    `row`: each person's rows are shared out, so test rows are over texts that training has seen. `text`: every response
    belongs to one part, and rows that mix parts are dropped. `prompt`: every prompt belongs to one part.

    Args:
        rows: preference rows.
        by: what no two parts share.
        validation_share: of what is left after new people.
        test_share: likewise.
        new_user_share: of all people who have two rows or more.
        seed: of everything that is drawn.

    Raises:
        ValueError: an unknown split, shares that leave nothing, or a part that came out empty.
    """
    if by not in get_args(SplitBy):
        raise ValueError(f"split={by!r}: choose one of {', '.join(get_args(SplitBy))}")
    rng = np.random.default_rng([seed, 23])
    users = [None if row.get("user") is None else str(row["user"]) for row in rows]
    new_people = _new_people(users, new_user_share, rng)
    shares = {"validation": validation_share, "test": test_share}
    known = [index for index, user in enumerate(users) if user not in new_people]
    if by == "row":
        part = _by_user(known, users, shares, rng)
        new = [index for index, user in enumerate(users) if user in new_people]
        dropped = 0
    else:
        part, new, dropped = _by_unit(rows, by, users, new_people, shares, rng)
    found = {name: [index for index in known if part.get(index) == name] for name in _PARTS}
    for name in _PARTS:
        if not found[name]:
            raise ValueError(f"split={by!r}: no row is left for {name} out of {len(rows)}; use another split or share")
    return RowSplit(found["train"], found["validation"], found["test"], new, dropped)


def validation_part(rows: Rows, *, by: SplitBy, share: float, seed: int) -> tuple[list[int], list[int], int]:
    """Training and validation indices of rows whose test rows stand elsewhere, and how many were dropped."""
    rng = np.random.default_rng([seed, 29])
    users = [None if row.get("user") is None else str(row["user"]) for row in rows]
    shares = {"validation": share, "test": 0.0}
    if by == "row":
        part, dropped = _by_user(list(range(len(rows))), users, shares, rng), 0
    else:
        part, _, dropped = _by_unit(rows, by, users, set(), shares, rng)
    train, validation = ([i for i in range(len(rows)) if part.get(i) == name] for name in ("train", "validation"))
    if not train or not validation:
        raise ValueError(f"split={by!r}: {len(rows)} rows leave no validation rows; raise validation_share")
    return train, validation, dropped


def _new_people(users: Sequence[str | None], share: float, rng: np.random.Generator) -> set[str | None]:
    names, count = np.unique([user for user in users if user is not None], return_counts=True)
    able = sorted(str(name) for name in names[count >= 2])
    return set(rng.permutation(able)[: round(share * len(able))].tolist())


def _by_user(
    indices: Sequence[int], users: Sequence[str | None], shares: Mapping[str, float], rng: np.random.Generator
) -> dict[int, str]:
    """Each person's rows shared out; a person keeps at least one for training."""
    by_user: dict[str | None, list[int]] = {}
    for index in indices:
        by_user.setdefault(users[index], []).append(index)
    part: dict[int, str] = {}
    for own in by_user.values():
        part |= dict(zip(rng.permutation(own).tolist(), _labels(len(own), shares, rng)))
    return part


def _labels(count: int, shares: Mapping[str, float], rng: np.random.Generator) -> list[str]:
    """`count` labels; what rounding leaves over is drawn, so that many people with few rows give their share."""
    sizes = {name: int(np.floor(share * count + rng.random())) for name, share in shares.items()}
    labels = [name for name, size in sizes.items() for _ in range(size)][: max(count - 1, 0)]
    return [*labels, *["train"] * (count - len(labels))]


def _by_unit(
    rows: Rows,
    by: SplitBy,
    users: Sequence[str | None],
    new_people: set[str | None],
    shares: Mapping[str, float],
    rng: np.random.Generator,
) -> tuple[dict[int, str], list[int], int]:
    """Texts or prompts shared out; new people keep rows over test texts alone."""
    of_row = [_units(row, by) for row in rows]
    units = sorted({unit for found in of_row for unit in found})
    labels = _labels(len(units), shares, rng)
    part_of = dict(zip((units[place] for place in rng.permutation(len(units))), labels))
    part: dict[int, str] = {}
    new: list[int] = []
    dropped = 0
    for index, found in enumerate(of_row):
        names = {part_of[unit] for unit in found}
        if len(names) > 1 or (users[index] in new_people and names != {"test"}):
            dropped += 1
        elif users[index] in new_people:
            new.append(index)
        else:
            part[index] = names.pop()
    return part, new, dropped


def _units(row: Mapping[str, Any], by: SplitBy) -> list[str]:
    prompt = json.dumps(row.get("prompt", row.get("prompt_ids")), sort_keys=True, default=str)
    if by == "prompt":
        return [prompt]
    if row.get("ranking") is not None:
        responses = list(row["ranking"])
    else:
        names = ("chosen", "rejected") if "chosen" in row else ("chosen_ids", "rejected_ids")
        responses = [row[name] for name in names]
    return [prompt + json.dumps(response, sort_keys=True, default=str) for response in responses]
