"""Pairs of arguments that people judged, split so that held-out pairs are over arguments that nobody trained on.

Legend: B pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.datasets import load_named
from prefmix.data.tokenization import tokenize_rows

SHARES = {"training": 0.45, "validation": 0.2, "test": 0.35}  # of each debate's arguments


class JudgedPair(NamedTuple):
    """Two arguments for one side of a debate, and how many people found each the more convincing one.

    Attributes:
        topic: the debate and its side.
        prompt: names both.
        texts: the two arguments; the first has at least as many votes.
        votes: their votes; ties are not counted.
    """

    topic: str
    prompt: str
    texts: tuple[str, str]
    votes: tuple[int, int]

    @property
    def agreement(self) -> float:
        """Share of the votes that the first argument got, 0.5 to 1."""
        return self.votes[0] / sum(self.votes)

    @property
    def row(self) -> dict[str, str]:
        """The preference of most of its judges."""
        return {"prompt": self.prompt, "chosen": self.texts[0], "rejected": self.texts[1]}


class Pairs(NamedTuple):
    """Pairs that are scored.

    Attributes:
        table: B comparisons, the chosen argument being the one with more votes.
        votes: [B, 2] votes for the chosen and the rejected argument.
        topic: [B] index of the debate's side, the cluster of all intervals.
    """

    table: ComparisonTable
    votes: np.ndarray
    topic: np.ndarray


class Debates(NamedTuple):
    """The rows of all arms.

    Attributes:
        few: training rows of every arm.
        many: all pairs of the same arguments, for heads, which can afford them.
        validation: chooses learning rates.
        test: is reported.
    """

    few: list[dict[str, str]]
    many: list[dict[str, str]]
    validation: Pairs
    test: Pairs


def load_debates(
    tokenizer: Any, *, max_words: int, pairs_per_side: int, min_agreement: float, max_sides: int | None, seed: int
) -> Debates:
    """Splits each side's arguments, and keeps the pairs whose two arguments fell into the same part.

    Args:
        tokenizer: of the base model.
        max_words: longer arguments are left out.
        pairs_per_side: training pairs of each side of a debate.
        min_agreement: of a training pair's judges; held-out pairs are kept whatever their judges said.
        max_sides: keep the first sides only (tests); None: all 24.
        seed: of the split and the choice of pairs.
    """
    pairs = judged_pairs(load_named("convarg", max_words=max_words))
    sides = list(dict.fromkeys(pair.topic for pair in pairs))[:max_sides]
    rng = np.random.default_rng(seed)
    parts: dict[str, list[JudgedPair]] = {name: [] for name in SHARES}
    few: list[JudgedPair] = []
    for side in sides:
        own = split_arguments([pair for pair in pairs if pair.topic == side], rng)
        agreed = [pair for pair in own["training"] if pair.agreement >= min_agreement]
        few += [agreed[i] for i in rng.permutation(len(agreed))[:pairs_per_side].tolist()]
        own["training"] = agreed
        for name, found in own.items():
            parts[name] += found
    return Debates(
        [pair.row for pair in few],
        [pair.row for pair in parts["training"]],
        _scored(parts["validation"], sides, tokenizer),
        _scored(parts["test"], sides, tokenizer),
    )


def judged_pairs(rows: Iterable[dict[str, Any]]) -> list[JudgedPair]:
    """Counts the votes of every pair; judgements that call two arguments equal are left out."""
    votes: dict[tuple[str, str, str, str], list[int]] = {}
    for row in rows:
        if not row["tie"]:
            first, second = sorted((row["chosen"], row["rejected"]))
            count = votes.setdefault((row["metadata"]["topic"], row["prompt"], first, second), [0, 0])
            count[row["chosen"] == second] += 1
    found = []
    for (topic, prompt, first, second), (a, b) in votes.items():
        texts, counts = ((first, second), (a, b)) if a >= b else ((second, first), (b, a))
        found.append(JudgedPair(topic, prompt, texts, counts))
    return found


def split_arguments(pairs: list[JudgedPair], rng: np.random.Generator) -> dict[str, list[JudgedPair]]:
    """Deals one side's arguments to training, validation and test; pairs across parts are dropped."""
    arguments = list(dict.fromkeys(text for pair in pairs for text in pair.texts))
    order = [arguments[i] for i in rng.permutation(len(arguments)).tolist()]
    ends = np.round(np.cumsum(list(SHARES.values())) * len(order)).astype(int).tolist()
    part_of = {text: list(SHARES)[np.searchsorted(ends, i, side="right")] for i, text in enumerate(order)}
    return {
        name: [pair for pair in pairs if part_of[pair.texts[0]] == name == part_of[pair.texts[1]]] for name in SHARES
    }


def _scored(pairs: list[JudgedPair], sides: list[str], tokenizer: Any) -> Pairs:
    table = tokenize_rows([pair.row for pair in pairs], tokenizer, progress=False)
    assert len(table) == len(pairs), "a pair was dropped"
    votes = np.array([pair.votes for pair in pairs], dtype=np.int64)
    return Pairs(table, votes, np.array([sides.index(pair.topic) for pair in pairs], dtype=np.int64))
