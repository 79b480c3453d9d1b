"""Cached trunk states: equal to unpadded ones, found again by content only, rebuilt when damaged."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from prefmix.data.comparisons import TextTable
from prefmix.experts import text_pass, trunk_cache
from prefmix.experts.trunk_cache import build_trunk_states
from prefmix.experts.trunk_files import map_hidden


@pytest.fixture
def trunk_calls(monkeypatch) -> list[int]:
    """One entry for every call of the trunk by the cache."""
    calls: list[int] = []
    original = text_pass.padded_states

    def counting(model, reading):
        calls.append(reading.num_texts)
        return original(model, reading)

    monkeypatch.setattr(text_pass, "padded_states", counting)
    return calls


def build(base, texts, folder, **options):
    return build_trunk_states(base, texts, cache_dir=folder, progress=False, **options)


@pytest.mark.parametrize("mode", ["disk", "memory"])
@pytest.mark.parametrize("tokens_per_batch", [1, 25, 1000])
def test_equal_to_unpadded_texts(base, make_texts, tmp_path, mode, tokens_per_batch, assert_states_of_whole_texts):
    texts = make_texts()
    states = build(base, texts, tmp_path, mode=mode, tokens_per_batch=tokens_per_batch)
    assert len(states) == 5
    assert states.num_tokens == texts.num_completion_tokens
    assert_states_of_whole_texts(base, texts, states)


def test_gather_keeps_the_order_asked_for(base, make_texts, tmp_path):
    texts = make_texts()
    states = build(base, texts, tmp_path)
    for ids in ([4, 0, 0, 2], np.array([4, 0, 0, 2]), torch.tensor([4, 0, 0, 2])):
        found = states.gather(ids)
        assert found["targets"].tolist() == [t for i in [4, 0, 0, 2] for t in texts.completion_ids[i]]
        assert found["segments"].tolist() == [0] * 9 + [1] + [2] + [3, 3]
        pieces = [states.gather([i])["hidden"] for i in [4, 0, 0, 2]]
        assert torch.equal(found["hidden"], torch.cat(pieces))


def test_same_content_is_found_again_and_one_changed_token_is_not(base, make_texts, tmp_path, trunk_calls):
    first = build(base, make_texts(), tmp_path)
    assert len(trunk_calls) > 0
    trunk_calls.clear()
    again = build(base, make_texts(), tmp_path)
    assert trunk_calls == []
    assert torch.equal(again.gather([0, 1, 2, 3, 4])["hidden"], first.gather([0, 1, 2, 3, 4])["hidden"])

    build(base, make_texts({2: [30, 39]}), tmp_path)
    assert len(trunk_calls) > 0
    trunk_calls.clear()
    build(base, make_texts(), tmp_path, dtype=torch.bfloat16)
    assert len(trunk_calls) > 0
    trunk_calls.clear()
    build(base._replace(sha256="another base"), make_texts(), tmp_path)
    assert len(trunk_calls) > 0


def test_moving_a_token_from_prompt_to_completion_is_another_content(base, tmp_path):
    index = np.array([0])
    one = TextTable([[5, 6]], [[7, 8]], index, [[5, 6]])
    other = TextTable([[5]], [[6, 7, 8]], index, [[5]])
    keys = {trunk_cache.cache_key(base, texts, torch.float32) for texts in (one, other)}
    assert len(keys) == 2


def damage_truncate(folder):
    os.truncate(folder / "hidden.bin", (folder / "hidden.bin").stat().st_size - 4)


def damage_flip(folder):
    with (folder / "hidden.bin").open("rb+") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))


def damage_tables(folder):
    (folder / "tables.safetensors").write_bytes(b"not safetensors")


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"format_version": 1, "fi')


def damage_missing(folder):
    (folder / "tables.safetensors").unlink()


def damage_manifest_of_wrong_type(folder):
    (folder / "manifest.json").write_text(json.dumps(["files"]))


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_flip,
        damage_tables,
        damage_manifest,
        damage_missing,
        damage_manifest_of_wrong_type,
    ],
)
def test_a_damaged_cache_is_named_and_built_anew(base, make_texts, tmp_path, trunk_calls, damage):
    first = build(base, make_texts(), tmp_path)
    expected = first.gather([0, 1, 2, 3, 4])["hidden"].clone()
    damage(first.folder)
    trunk_calls.clear()
    with pytest.warns(UserWarning, match="damaged"):
        rebuilt = build(base, make_texts(), tmp_path)
    assert len(trunk_calls) > 0
    assert torch.equal(rebuilt.gather([0, 1, 2, 3, 4])["hidden"], expected)
    trunk_calls.clear()
    build(base, make_texts(), tmp_path)
    assert trunk_calls == []


def test_an_interrupted_build_leaves_nothing_behind(base, make_texts, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trunk_cache, "write_tables", stop)
    with pytest.raises(KeyboardInterrupt):
        build(base, make_texts(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_states_halve_the_file(base, make_texts, tmp_path, dtype):
    full, half = build(base, make_texts(), tmp_path), build(base, make_texts(), tmp_path, dtype=dtype)
    assert 2 * (half.folder / "hidden.bin").stat().st_size == (full.folder / "hidden.bin").stat().st_size
    hidden = half.gather([0, 1])["hidden"]
    assert hidden.dtype == dtype
    torch.testing.assert_close(hidden.float(), full.gather([0, 1])["hidden"], rtol=1e-2, atol=1e-2)
    assert half.completion_mean.dtype == half.prompt_mean.dtype == torch.float32


def test_a_prompt_without_texts_has_a_mean_too(base, make_texts, tmp_path):
    texts = make_texts()
    extra = TextTable(texts.prompt_ids, texts.completion_ids, texts.prompt_index, [*texts.prompts, [50, 51]])
    states = build(base, extra, tmp_path)
    with torch.no_grad():
        expected = base.model.model(torch.tensor([[50, 51]])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(states.prompt_mean[3], expected, rtol=1e-5, atol=1e-5)


def test_an_empty_prompt_is_scored_from_the_second_token_on(base, tmp_path):
    texts = TextTable([[]], [[5, 6, 7]], np.array([0]), [[]])
    states = build(base, texts, tmp_path)
    assert states.gather([0])["targets"].tolist() == [6, 7]
    assert torch.equal(states.prompt_mean, torch.zeros(1, 32))
    with pytest.raises(ValueError, match="text 0"):
        build(base, TextTable([[]], [[5]], np.array([0]), [[]]), tmp_path)


def test_a_full_disk_is_said_before_reading(base, make_texts, tmp_path, monkeypatch, trunk_calls):
    monkeypatch.setattr("prefmix.experts.trunk_files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match="cache_dir"):
        build(base, make_texts(), tmp_path)
    assert trunk_calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="this system does not say which pages are in memory")
def test_states_on_disk_are_not_read_into_memory(tmp_path):
    rows, columns = 2**16, 256
    map_hidden(tmp_path, rows, columns, torch.float32, create=True)[:] = 1.0  # 64 MB
    states = map_hidden(tmp_path, rows, columns, torch.float32)
    assert float(states[torch.tensor([5, 30_000, 65_000])].sum()) == 3 * columns
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        resident, inside = 0, False
        for line in lines:
            if "-" in line.split()[0]:  # the first line of a mapping
                inside = line.rstrip().endswith(str(tmp_path / "hidden.bin"))
            elif inside and line.startswith("Rss:"):
                resident += int(line.split()[1])
    assert resident < 8 * 1024  # kB; the system maps what lies around a page that is asked for
