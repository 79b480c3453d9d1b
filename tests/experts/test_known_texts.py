"""A text that some table of the same base has is never read again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefmix.data.comparisons import TextTable
from prefmix.experts import trunk_cache
from prefmix.experts.known_texts import text_keys
from prefmix.experts.trunk_cache import build_trunk_states

PROMPTS = [[5, 6], [7]]


def table(rows: list[tuple[int, list[int]]]) -> TextTable:
    return TextTable([PROMPTS[p] for p, _ in rows], [c for _, c in rows], np.array([p for p, _ in rows]), PROMPTS)


FIRST = table([(0, [20, 21]), (1, [22]), (0, [23, 24, 25])])
SECOND = table([(1, [26]), (0, [23, 24, 25]), (1, [20, 21]), (1, [22])])


@pytest.fixture
def read_ids(monkeypatch) -> list[list[int]]:
    """The ids that the trunk is asked to read, one list for each table."""
    asked: list[list[int]] = []
    original = trunk_cache.read_texts

    def watching(model, texts, text_ids, **options):
        asked.append(text_ids.tolist())
        return original(model, texts, text_ids, **options)

    monkeypatch.setattr(trunk_cache, "read_texts", watching)
    return asked


def test_only_new_texts_are_read(base, tmp_path, read_ids):
    build_trunk_states(base, FIRST, cache_dir=tmp_path, progress=False)
    found = build_trunk_states(base, SECOND, cache_dir=tmp_path, progress=False)
    # The same answer to another prompt is another text.
    assert read_ids == [[0, 1, 2], [0, 2]]
    alone = build_trunk_states(base, SECOND, mode="memory", progress=False)
    torch.testing.assert_close(found.gather([0, 1, 2, 3])["hidden"], alone.gather([0, 1, 2, 3])["hidden"])
    torch.testing.assert_close(found.completion_mean, alone.completion_mean)
    torch.testing.assert_close(found.prompt_mean, alone.prompt_mean)


def test_known_states_are_copied_a_few_at_a_time(base, tmp_path, monkeypatch):
    build_trunk_states(base, FIRST, cache_dir=tmp_path, progress=False)
    copied: list[int] = []
    original = trunk_cache.TrunkStates.batch

    def watching(self, text_ids, found):
        copied.append(len(found))
        return original(self, text_ids, found)

    monkeypatch.setattr(trunk_cache.TrunkStates, "batch", watching)
    monkeypatch.setattr(trunk_cache, "_COPIED_TOKENS", 2)
    again = table([(0, [20, 21]), (1, [22]), (0, [23, 24, 25]), (1, [27])])
    found = build_trunk_states(base, again, cache_dir=tmp_path, progress=False)
    assert sum(copied) == 3 and len(copied) > 1
    alone = build_trunk_states(base, again, mode="memory", progress=False)
    torch.testing.assert_close(found.gather([0, 1, 2, 3])["hidden"], alone.gather([0, 1, 2, 3])["hidden"])


def test_another_base_or_type_knows_nothing(base, tmp_path, read_ids):
    build_trunk_states(base, FIRST, cache_dir=tmp_path, progress=False)
    build_trunk_states(base._replace(sha256="another"), FIRST, cache_dir=tmp_path, progress=False)
    build_trunk_states(base, FIRST, cache_dir=tmp_path, dtype=torch.bfloat16, progress=False)
    assert read_ids == [[0, 1, 2]] * 3


def test_a_damaged_cache_is_passed_over(base, tmp_path, read_ids):
    folder = build_trunk_states(base, FIRST, cache_dir=tmp_path, progress=False).folder
    (folder / "tables.safetensors").write_bytes(b"not safetensors")
    build_trunk_states(base, SECOND, cache_dir=tmp_path, progress=False)
    assert read_ids[1] == [0, 1, 2, 3]


def test_keys_tell_prompt_and_completion_apart():
    one = TextTable([[5, 6]], [[7]], np.array([0]), [[5, 6]])
    other = TextTable([[5]], [[6, 7]], np.array([0]), [[5]])
    assert text_keys(one).tolist() != text_keys(other).tolist()
