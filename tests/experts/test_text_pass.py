"""What texts begin with alike is read once, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefmix.data.comparisons import TextTable
from prefmix.data.prefixes import SHORTEST_PREFIX
from prefmix.experts import reading, text_pass
from prefmix.experts.trunk_cache import build_trunk_states

LONG = list(range(5, 5 + SHORTEST_PREFIX))
OTHER = list(range(9, 9 + SHORTEST_PREFIX + 3))
SHORT = [7, 8]


@pytest.fixture
def texts() -> TextTable:
    prompts = [LONG, OTHER, SHORT]
    completions = {0: [[20], [21, 22, 23], [24, 25]], 1: [[30, 31]], 2: [[40], [41, 42]]}
    rows = [(p, c) for p, answers in completions.items() for c in answers]
    return TextTable([prompts[p] for p, _ in rows], [c for _, c in rows], np.array([p for p, _ in rows]), prompts)


def batches(texts, size):
    ids = np.array([5, 0, 4, 1, 3, 2])
    return [batch.tolist() for batch in text_pass._neighbours(texts, ids, size)]


def test_neighbours_begin_alike_and_batches_keep_to_their_size(texts):
    assert batches(texts, 1000) == [[0, 1, 2, 4, 5, 3]]
    # 12 + 1, 3, 2, then [7 8 40], 2 more, and 15 + 2.
    assert batches(texts, 18) == [[0, 1, 2], [4, 5], [3]]
    assert batches(texts, 17) == [[0, 1], [2, 4], [5], [3]]
    assert batches(texts, 1) == [[0], [1], [2], [4], [5], [3]]


def test_states_equal_those_of_whole_texts(base, texts, assert_states_of_whole_texts):
    states = build_trunk_states(base, texts, mode="memory", progress=False)
    assert_states_of_whole_texts(base, texts, states)


def test_the_prompt_is_read_once(base, texts, monkeypatch):
    read: list[int] = []
    original = reading.run_trunk

    def counting(model, input_ids, attention_mask, **options):
        read.append(input_ids.numel())
        return original(model, input_ids, attention_mask, **options)

    reader = text_pass.TextReader(base.model)
    monkeypatch.setattr(text_pass, "TextReader", lambda model: reader)
    monkeypatch.setattr(reading, "run_trunk", counting)
    build_trunk_states(base, texts, mode="memory", progress=False)
    assert read == [len(LONG) + 1 + 3 + 2 + len(OTHER) + 2 + 3 + 4]  # short prompts with each of their texts


def test_a_model_that_cannot_share_reads_padded_texts(base, texts, monkeypatch):
    expected = build_trunk_states(base, texts, mode="memory", progress=False)
    reader = text_pass.TextReader(base.model)
    reader.shares = False
    monkeypatch.setattr(text_pass, "TextReader", lambda model: reader)
    found = build_trunk_states(base, texts, mode="memory", progress=False)
    torch.testing.assert_close(found.completion_mean, expected.completion_mean, rtol=1e-5, atol=1e-5)
