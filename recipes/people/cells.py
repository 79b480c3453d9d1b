"""One cut of one set: rows to feature differences, every method fitted, and what each says of rows nobody trained on.

Legend: B comparisons, P features, U users, n comparisons told of a new person.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import linear
import numpy as np
import torch
from sets import PROMPTS, PeopleSet, Rated, Row, Split, cut, shuffle_users
from states import Texts
from torch import Tensor

from prefmix.mixture.linear_em import ProbeData

COUNTS = (0, 1, 2, 4, 8, 16)
# Methods whose gain must vanish when ids are shuffled.
SHUFFLED = ("user", "membership")
TOP = 10


class Prepared(NamedTuple):
    """A cut as tensors; people have the positions of `users`."""

    users: Sequence[str]
    train: ProbeData
    validation: ProbeData
    test: ProbeData
    new_context: ProbeData
    new_test: ProbeData
    ranked: Sequence[Rated]


def prepare(people: PeopleSet, seed: int, texts: Texts, *, shuffled: bool = False) -> Prepared:
    """Cuts a set and looks its texts up; with `shuffled`, training rows have authors from a hat."""
    split = cut(people, seed)
    rows = split.known["train"]
    users = sorted({row["user"] for row in rows})
    place = {user: index for index, user in enumerate(users)}
    if shuffled:
        rows = shuffle_users(rows, seed)
    known = [[row for row in split.known[part] if row["user"] in place] for part in ("validation", "test")]
    context, new_test = _new_people(split)
    fresh = {user: index for index, user in enumerate(sorted({row["user"] for row in context}))}
    data = [_data(part, place, texts) for part in (rows, *known)]
    ranked = [rated for rated in split.ranked if rated.user in place]
    return Prepared(users, *data, _data(context, fresh, texts), _data(new_test, fresh, texts), ranked)


def search(method: str, prepared: Prepared, single: linear.Types | None, seed: int) -> list[float]:
    """Validation log-loss of every configuration of a method's grid, fitted to the training rows of one cut."""
    fits = (linear.fit(method, config, prepared.train, seed, single) for config in linear.GRIDS[method])
    return [float(row_loss(model, prepared.validation).mean()) for model in fits]


def run_cell(
    people: PeopleSet, seed: int, texts: Texts, chosen: Mapping[str, Mapping[str, float]], *, shuffled: bool
) -> dict[str, Any]:
    """Fits every method with its chosen configuration and scores it.

    Returns:
        users [U] names; and by method: loss, hit [B] of test rows, and for true ids new_loss [n, B'] and, of jokes and
        films, ndcg and top [R].
    """
    began, prepared = time.process_time(), prepare(people, seed, texts, shuffled=shuffled)
    single = linear.fit("single", chosen["single"], prepared.train, seed)
    assert isinstance(single, linear.Types)
    found: dict[str, Any] = {"users": list(prepared.users), "user": prepared.test.group.numpy(), "methods": {}}
    found["new_user"] = prepared.new_test.group.numpy()
    for method in ("single", *SHUFFLED) if shuffled else linear.METHODS:
        model = single if method == "single" else linear.fit(method, chosen[method], prepared.train, seed, single)
        odds = linear.log_odds(model, prepared.test.difference, prepared.test.group).double()
        scores = {"loss": -torch.nn.functional.logsigmoid(odds).numpy(), "hit": hits(odds)}
        if not shuffled:
            scores["new_loss"] = _new_losses(model, prepared, chosen[method].get("weight", 1.0))
            scores |= _rankings(model, prepared, texts, PROMPTS.get(people.name, ""))
        found["methods"][method] = scores | {"about": linear.describe(model)}
    found["rows"] = {part: len(getattr(prepared, part).group) for part in ("train", "validation", "test", "new_test")}
    found["cpu_seconds"] = time.process_time() - began
    return found


def row_loss(model: linear.Model, data: ProbeData) -> Tensor:
    """[B] log-loss of rows, each for its person."""
    return -torch.nn.functional.logsigmoid(linear.log_odds(model, data.difference, data.group).double())


def hits(odds: Tensor) -> np.ndarray:
    """[B] 1 where the chosen text is ahead, 0.5 on a draw."""
    return ((odds > 0).double() + 0.5 * (odds == 0).double()).numpy()


def ndcg(scores: np.ndarray, ratings: np.ndarray, top: int = TOP) -> float:
    """Discounted gain of the `top` things by score over that of the best order; the gain is the rating above the least.

    Source: Järvelin & Kekäläinen 2002, linear gains, discount 1 / log2(1 + place).
    """
    gains = ratings - ratings.min()
    discount = 1.0 / np.log2(np.arange(2, min(top, len(gains)) + 2))
    best = float(np.sort(gains)[::-1][: len(discount)] @ discount)
    order = np.argsort(-scores, kind="stable")
    return float(gains[order][: len(discount)] @ discount) / best if best > 0 else 1.0


def top_is_liked(scores: np.ndarray, ratings: np.ndarray) -> float:
    """1 where the first thing by score is in the upper quarter of the person's own held-out ratings."""
    return float(ratings[np.argmax(scores)] >= np.quantile(ratings, 0.75))


def _rankings(model: linear.Model, prepared: Prepared, texts: Texts, prompt: str) -> dict[str, np.ndarray]:
    place, reward = {user: index for index, user in enumerate(prepared.users)}, linear.directions(model)
    found: dict[str, list[float]] = {"ndcg": [], "top": [], "ranked_user": []}
    for rated in prepared.ranked:
        features = texts.features[[texts.index[prompt, text] for text in rated.texts]]
        scores = (features @ reward[place[rated.user]]).numpy()
        found["ndcg"].append(ndcg(scores, rated.ratings))
        found["top"].append(top_is_liked(scores, rated.ratings))
        found["ranked_user"].append(place[rated.user])
    return {name: np.array(values) for name, values in found.items()}


def _new_people(split: Split) -> tuple[list[Row], list[Row]]:
    """Context and scored rows of new people who can be told `max(COUNTS)` comparisons of."""
    context: dict[str, list[Row]] = {}
    for row in split.new["train"]:
        context.setdefault(row["user"], []).append(row)
    scored = {row["user"] for row in split.new["test"]}
    enough = {
        user: rows[: max(COUNTS)] for user, rows in context.items() if len(rows) >= max(COUNTS) and user in scored
    }
    return [row for rows in enough.values() for row in rows], [r for r in split.new["test"] if r["user"] in enough]


def _new_losses(model: linear.Model, prepared: Prepared, weight: float) -> np.ndarray:
    """[n, B'] log-loss of new people's scored rows when n comparisons of each are told."""
    context, losses = prepared.new_context, []
    for count in COUNTS:
        told = torch.arange(len(context.group)) % max(COUNTS) < count
        losses.append(row_loss(linear.adapt(model, context.select(told), weight), prepared.new_test).numpy())
    return np.stack(losses)


def _data(rows: Sequence[Row], place: Mapping[str, int], texts: Texts) -> ProbeData:
    chosen, rejected = texts.pairs(rows)
    group = torch.tensor([place[row["user"]] for row in rows], dtype=torch.int64)
    return ProbeData(texts.features[chosen] - texts.features[rejected], group, torch.ones(len(rows)), len(place))
