"""A prompt that many texts share is read once, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefmix.data.comparisons import TextTable
from prefmix.experts import shared_prompt, text_pass
from prefmix.experts.shared_prompt import SHORTEST_PROMPT, shared_prompt_batches
from prefmix.experts.trunk_cache import build_trunk_states

LONG = list(range(5, 5 + SHORTEST_PROMPT))
OTHER = list(range(9, 9 + SHORTEST_PROMPT + 3))
SHORT = [7, 8]


@pytest.fixture
def texts() -> TextTable:
    prompts = [LONG, OTHER, SHORT]
    completions = {0: [[20], [21, 22, 23], [24, 25]], 1: [[30, 31]], 2: [[40], [41, 42]]}
    rows = [(p, c) for p, answers in completions.items() for c in answers]
    return TextTable([prompts[p] for p, _ in rows], [c for _, c in rows], np.array([p for p, _ in rows]), prompts)


def test_only_long_prompts_of_several_texts_are_shared(texts):
    batches, rest = shared_prompt_batches(texts, np.arange(6), tokens_per_batch=1000)
    assert [sorted(batch) for batch in batches] == [[0, 1, 2]]
    assert rest.tolist() == [3, 4, 5]


def test_batches_keep_to_their_size_and_hold_every_text_once(texts):
    batches, rest = shared_prompt_batches(texts, np.arange(6), tokens_per_batch=2 * SHORTEST_PROMPT + 6)
    assert [len(batch) for batch in batches] == [2, 1]
    assert sorted(np.concatenate([*batches, rest])) == list(range(6))


def test_states_equal_those_of_whole_texts(base, texts):
    states = build_trunk_states(base, texts, mode="memory", progress=False)
    for i, (prompt, completion) in enumerate(zip(texts.prompt_ids, texts.completion_ids)):
        with torch.no_grad():
            expected = base.model.model(torch.tensor([prompt + completion])).last_hidden_state[0]
        found = states.gather([i])
        torch.testing.assert_close(found["hidden"], expected[len(prompt) - 1 : -1], rtol=1e-5, atol=1e-5)
        assert found["targets"].tolist() == completion
        torch.testing.assert_close(states.completion_mean[i], expected[len(prompt) :].mean(0), rtol=1e-5, atol=1e-5)
        prompt_mean = states.prompt_mean[texts.prompt_index[i]]
        torch.testing.assert_close(prompt_mean, expected[: len(prompt)].mean(0), rtol=1e-5, atol=1e-5)


def test_the_prompt_is_read_once(base, texts, monkeypatch):
    read: list[int] = []
    original = shared_prompt.run_trunk

    def counting(model, input_ids, attention_mask, **options):
        read.append(input_ids.numel())
        return original(model, input_ids, attention_mask, **options)

    monkeypatch.setattr(shared_prompt, "run_trunk", counting)
    build_trunk_states(base, texts, mode="memory", progress=False)
    assert read == [len(LONG), 3 * 3]


def test_a_model_without_keys_and_values_reads_whole_texts(base, texts, monkeypatch):
    expected = build_trunk_states(base, texts, mode="memory", progress=False)
    monkeypatch.setattr(text_pass, "read_shared_prompt", lambda *_: None)
    found = build_trunk_states(base, texts, mode="memory", progress=False)
    torch.testing.assert_close(found.completion_mean, expected.completion_mean, rtol=1e-5, atol=1e-5)
