"""Planted groups over named texts: review readers, and people who hold one side of a debate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from prefmix.data.convarg import convarg_sides
from prefmix.data.datasets import read_named_file
from prefmix.data.synthetic import PlantedSplits, planted_groups

ReviewTask = Literal["sentiment", "sentiment_and_length", "domain"]


class _Task(NamedTuple):
    prompt: str
    preferences: dict[str, Sequence[float]]


REVIEW_TASKS: dict[str, _Task] = {
    "sentiment": _Task("Write a review of a film.\n", {"likes praise": (1, 0), "likes blame": (0, 1)}),
    # Sides: praise short, praise long, blame short, blame long. Pairs differ in both, so all groups have a preference.
    "sentiment_and_length": _Task(
        "Write a review of a film.\n",
        {"likes praise": (1, 1, 0, 0), "likes blame": (0, 0, 1, 1), "likes length": (0, 1, 0, 1)},
    ),
    # Sides: films, books, DVDs. Each group has its favourite and a second choice.
    "domain": _Task("Write a review.\n", {"likes films": (2, 1, 0), "likes books": (0, 2, 1), "likes DVDs": (1, 0, 2)}),
}

SHORT_WORDS = 12


def review_groups(
    task: ReviewTask = "sentiment",
    *,
    num_users: int = 40,
    comparisons_per_user: int = 16,
    seed: int = 0,
    texts_per_side: int = 930,
    num_words: int = 30,
    **options: Any,
) -> PlantedSplits:
    """Readers of real reviews (IMDb; Amazon books and DVDs) with planted tastes.

    Args:
        task: `sentiment` (two opposed groups), `sentiment_and_length` or `domain` (three groups).
        num_users: users in all groups together.
        comparisons_per_user: training rows of each user.
        seed: decides texts, groups and draws.
        texts_per_side: texts drawn for each side; 60% of them are for training.
        num_words: every review is cut to its last so many words, about 1.3 tokens each (short ones: 12). Its end,
            because the verdict stands there; openings tell the plot more than what the reviewer thought of it.
        options: further arguments of `planted_groups`.

    Raises:
        ValueError: where the reviews are not found (see PREFMIX_DATA) or the task is unknown.
    """
    if task not in REVIEW_TASKS:
        raise ValueError(f"task={task!r} is not known. Use one of {', '.join(REVIEW_TASKS)}.")
    rng = np.random.default_rng([seed, 1])
    sides = {
        name: _snippets(texts, words, texts_per_side, rng)
        for name, (texts, words) in _review_sides(task, num_words).items()
    }
    prompt, preferences = REVIEW_TASKS[task]
    return planted_groups(
        {prompt: sides},
        num_users=num_users,
        comparisons_per_user=comparisons_per_user,
        preferences=preferences,
        seed=seed,
        **options,
    )


def convarg_groups(
    *,
    debates: Sequence[str] | None = None,
    num_users: int = 40,
    comparisons_per_user: int = 16,
    seed: int = 0,
    max_words: int | None = None,
    **options: Any,
) -> PlantedSplits:
    """People who hold one side of each debate, over the arguments that the package ships.

    The prompt names the debate and no side. Group `first side` prefers arguments for the first side of every debate
    (as `convarg_sides` orders them), `second side` those for the other.

    Args:
        debates: beginnings of titles; None for all twelve debates.
        num_users: users in both groups together.
        comparisons_per_user: training rows of each user.
        seed: decides texts, groups and draws.
        max_words: leave longer arguments out.
        options: further arguments of `planted_groups`.

    Raises:
        ValueError: where no debate is left.
    """
    everything = convarg_sides(max_words=max_words)
    wanted = tuple(f"Debate: {debate}" for debate in debates) if debates is not None else ("",)
    sides = {prompt: texts for prompt, texts in everything.items() if prompt.startswith(wanted)}
    if not sides:
        titles = [prompt.splitlines()[0].removeprefix("Debate: ") for prompt in everything]
        raise ValueError(f"debates={debates!r} name no debate. Use beginnings of: {'; '.join(titles)}.")
    return planted_groups(
        sides,
        num_users=num_users,
        comparisons_per_user=comparisons_per_user,
        preferences={"first side": (1, 0), "second side": (0, 1)},
        seed=seed,
        **options,
    )


def _review_sides(task: str, num_words: int) -> dict[str, tuple[list[str], int]]:
    """Side -> (whole reviews, words to keep), disjoint between sides."""
    movies = read_named_file("reviews", "movies_train")
    if task == "domain":
        other = read_named_file("reviews", "books_dvd")
        texts = {domain: [row["text"] for row in other if row["domain"] == domain] for domain in ("books", "dvd")}
        return {"films": ([row["text"] for row in movies], num_words)} | {k: (v, num_words) for k, v in texts.items()}
    praise, blame = ([row["text"] for row in movies if row["label"] == label] for label in ("pos", "neg"))
    if task == "sentiment":
        return {"praise": (praise, num_words), "blame": (blame, num_words)}
    return {
        "praise, short": (praise[::2], SHORT_WORDS),
        "praise, long": (praise[1::2], num_words),
        "blame, short": (blame[::2], SHORT_WORDS),
        "blame, long": (blame[1::2], num_words),
    }


def _snippets(texts: Sequence[str], num_words: int, count: int, rng: np.random.Generator) -> list[str]:
    long_enough = list(dict.fromkeys(" ".join(t.split()[-num_words:]) for t in texts if len(t.split()) >= num_words))
    return [long_enough[i] for i in rng.permutation(len(long_enough))[:count]]
