"""Is it still language, and is it always the same? Figures of texts that no reward model enters.

Legend: N texts, P prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

from prefmix.evaluation.rewards import words

_Part = TypeVar("_Part", bound=Hashable)


def distinct_share(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n: different n-grams of words over all n-grams of all texts; nan without any.

    It falls with the amount of text, so compare sets of equal size. Source: Li et al. 2016.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(text: str, n: int = 3) -> float:
    """Share of a text's n-grams of words that stood in it before, in [0, 1); 0 where it has none."""
    return repeated_share(words(text), n)


def repeated_share(parts: Sequence[Hashable], n: int = 3) -> float:
    """Share of the n-grams of a sequence (words, or tokens) that stood in it before, in [0, 1); 0 where it has none."""
    grams = _runs(parts, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def overlap_within_prompts(texts: Sequence[str], prompt: Sequence[int], n: int = 2) -> float:
    """How alike two responses to one prompt are: shared n-grams over the mean number of n-grams, in [0, 1].

        2 |A n B| / (|A| + |B|),  multisets (Dice), mean over pairs, then over prompts

    1 where a prompt always gets the same text; nan where no prompt has two responses. Symmetric, unlike self-BLEU.

    Args:
        texts: [N] responses.
        prompt: [N] which prompt each answers.
        n: words of an n-gram.
    """
    groups: dict[int, list[Counter[tuple[str, ...]]]] = {}
    for text, index in zip(texts, prompt, strict=True):
        groups.setdefault(int(index), []).append(Counter(_grams(text, n)))
    means = [
        float(np.mean([_dice(a, b) for i, a in enumerate(group) for b in group[:i]]))
        for group in groups.values()
        if len(group) > 1
    ]
    return float(np.mean(means)) if means else float("nan")


def _dice(first: Counter[tuple[str, ...]], second: Counter[tuple[str, ...]]) -> float:
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    return _runs(words(text), n)


def _runs(parts: Sequence[_Part], n: int) -> list[tuple[_Part, ...]]:
    return [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
