"""The tree of shared beginnings: it spells every text, and no token that is worth sharing stands twice."""

from __future__ import annotations

import numpy as np
import pytest

from prefmix.data.prefixes import Span, prefix_tree


def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.array([len(tokens) for tokens in rows])


def spelled(spans: list[Span], rows: list[list[int]]) -> list[list[int]]:
    """The texts as their spans give them, each span's tokens taken from its first text."""
    found: list[list[int]] = [[] for _ in rows]
    for number, span in enumerate(spans):
        for text in span.texts:
            assert len(found[text]) == span.start
            assert all(parent < number and text in spans[parent].texts for parent in span.parents)
            assert sum(spans[p].stop - spans[p].start for p in span.parents) == span.start
            found[text] += rows[span.texts[0]][span.start : span.stop]
    return found


def test_the_example_of_the_docstring() -> None:
    spans = prefix_tree(*padded([[1, 2, 3, 4], [1, 2, 3, 5, 6], [7, 8]]), shortest=2)
    found = [(span.texts.tolist(), span.start, span.stop, span.parents) for span in spans]
    assert found == [([0, 1], 0, 3, ()), ([0], 3, 4, (0,)), ([1], 3, 5, (0,)), ([2], 0, 2, ())]


@pytest.mark.parametrize("shortest", [1, 2, 3, 50])
@pytest.mark.parametrize("seed", range(20))
def test_random_texts_are_spelled_and_shared(seed: int, shortest: int) -> None:
    rng = np.random.default_rng(seed)
    # Two letters, so that beginnings repeat, texts repeat, and texts are beginnings of others.
    rows = [rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 12))]
    spans = prefix_tree(*padded(rows), shortest=shortest)
    assert spelled(spans, rows) == rows
    shared = [span for span in spans if len(span.texts) > 1]
    assert all(span.stop - span.start >= shortest for span in shared)
    if shortest == 1:  # a trie: as many tokens as there are distinct beginnings
        beginnings = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
        assert sum(span.stop - span.start for span in spans) == len(beginnings)
    if shortest == 50:
        assert len(spans) == len(rows) and not shared


def test_padding_is_no_beginning() -> None:
    spans = prefix_tree(*padded([[0, 0, 0, 0], [0, 0], [0, 0, 0]]), shortest=2)
    assert [(span.texts.tolist(), span.start, span.stop) for span in spans] == [
        ([0, 1, 2], 0, 2),
        ([0], 2, 4),
        ([2], 2, 3),
    ]


def test_a_system_prompt_and_prompts_below_it() -> None:
    system, first, second = list(range(20)), list(range(30, 50)), list(range(60, 80))
    rows = [system + prompt + [100 + i] for i, prompt in enumerate([first, first, second, second, second])]
    spans = prefix_tree(*padded(rows))
    assert [(span.texts.tolist(), span.stop - span.start) for span in spans if len(span.texts) > 1] == [
        ([0, 1, 2, 3, 4], 20),
        ([0, 1], 20),
        ([2, 3, 4], 20),
    ]
