"""Real people's preferences that the package ships: which of two arguments of a debate is more convincing.

Source: UKPConvArg1, Habernal & Gurevych, ACL 2016 (CC-BY 4.0); `files/convarg/ATTRIBUTION.md`.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple


class Argument(NamedTuple):
    """One argument.

    Attributes:
        topic: the debate and its side, as the set names them.
        side: the side argued for.
        text: the argument, lines as its author broke them.
    """

    topic: str
    side: str
    text: str


def load_convarg(
    *,
    topics: Sequence[str] | None = None,
    min_judgements: int = 0,
    max_words: int | None = None,
    conversational: bool = False,
) -> list[dict[str, Any]]:
    """Judgements as preference rows: 782 arguments, 62,328 judgements of 3,678 people, 13,589 of them ties.

    Every row has the columns `prompt`, `chosen`, `rejected`, `user`, `tie`, and `metadata` with the `topic` and, where
    it was asked, the judge's `stance` towards the side (`same`, `opposite`, `none`).

    Args:
        topics: keep debates whose topic or title is, or begins with, one of these; None for all.
        min_judgements: keep people with at least so many judgements that are no ties, counted after the other filters.
        max_words: keep pairs in which neither argument is longer, in words.
        conversational: messages instead of plain text.

    Raises:
        ValueError: where nothing is left.
    """
    rows = [
        _row(judgement, conversational)
        for judgement in _judgements()
        if _wanted(judgement, topics) and _short_enough(judgement, max_words)
    ]
    decisive = Counter(row["user"] for row in rows if not row["tie"])
    rows = [row for row in rows if decisive[row["user"]] >= min_judgements]
    if not rows:
        raise ValueError(
            f"no judgement is left with topics={topics!r}, min_judgements={min_judgements}, max_words={max_words}. "
            f"Loosen one of them; topics are {', '.join(convarg_topics())}."
        )
    return rows


def convarg_topics() -> list[str]:
    """The 24 debates with their sides, as `metadata.topic` names them."""
    return list(dict.fromkeys(judgement["topic"] for judgement in _judgements()))


def convarg_sides(*, max_words: int | None = None) -> dict[str, dict[str, list[str]]]:
    """Prompt that names a debate but no side -> its two sides -> their arguments.

    Args:
        max_words: leave longer arguments out.
    """
    titles = {judgement["topic"]: judgement["title"] for judgement in _judgements()}
    sides: dict[str, dict[str, list[str]]] = {}
    for argument in _arguments().values():
        if max_words is None or len(argument.text.split()) <= max_words:
            prompt = f"Debate: {titles[argument.topic]}\nWhat do you think? Give one argument.\n"
            texts = sides.setdefault(prompt, {}).setdefault(argument.side, [])
            if argument.text not in texts:
                texts.append(argument.text)
    return sides


def _row(judgement: dict[str, Any], conversational: bool) -> dict[str, Any]:
    arguments = _arguments()
    first, second = (arguments[judgement[name]].text for name in ("a1", "a2"))
    chosen, rejected = (second, first) if judgement["value"] == "a2" else (first, second)
    # The prompt ends with a line break, which is a token of its own in front of any response.
    prompt = f"Debate: {judgement['title']}\nSide: {judgement['side']}\nGive one argument for this side.\n"
    metadata = {"topic": judgement["topic"]}
    if judgement["user_stance"] is not None:
        metadata["stance"] = judgement["user_stance"]
    return {
        "prompt": [{"role": "user", "content": prompt.strip()}] if conversational else prompt,
        "chosen": [{"role": "assistant", "content": chosen}] if conversational else chosen,
        "rejected": [{"role": "assistant", "content": rejected}] if conversational else rejected,
        "user": judgement["user"],
        "tie": judgement["value"] == "equal" or chosen == rejected,
        "metadata": metadata,
    }


def _wanted(judgement: dict[str, Any], topics: Sequence[str] | None) -> bool:
    return (
        topics is None or judgement["topic"].startswith(tuple(topics)) or judgement["title"].startswith(tuple(topics))
    )


def _short_enough(judgement: dict[str, Any], max_words: int | None) -> bool:
    arguments = _arguments()
    return max_words is None or all(len(arguments[judgement[name]].text.split()) <= max_words for name in ("a1", "a2"))


@cache
def _arguments() -> dict[str, Argument]:
    return {
        row["id"]: Argument(row["topic"], row["side"], row["text"].replace("<br/>", "\n").strip())
        for row in _shipped("arguments")
    }


@cache
def _judgements() -> list[dict[str, Any]]:
    return _shipped("judgements")


def _shipped(name: str) -> list[dict[str, Any]]:
    packed = resources.files("prefmix.data").joinpath("files", "convarg", f"{name}.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
