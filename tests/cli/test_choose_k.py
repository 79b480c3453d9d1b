"""The verb from rows to picture, JSON and next command, on a tiny model; `--confirm` trains heads for two K."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmix.cli.main import main

LOVED = [" I loved the film.", " it was great.", " The film was great, I loved it."]
HATED = [" I hated the film.", " it was bad.", " The film was bad, I hated it."]


def _rows() -> list[dict[str, Any]]:
    rows = []
    for user in range(12):
        for i in range(4):
            praise, blame = LOVED[(user + i) % 3], HATED[i % 3]
            chosen, rejected = (praise, blame) if user % 2 == 0 else (blame, praise)
            rows.append(
                {"prompt": "Write a review of the film.", "chosen": chosen, "rejected": rejected, "user": f"u{user}"}
            )
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("choose_k")
    make_tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()), encoding="utf-8")
    return folder


def _words(place: Path) -> list[str]:
    words = ["choose-k", str(place / "rows.jsonl"), "--model", str(place / "model"), "--max_k", "3"]
    words += ["--probe_dim", "4", "--probe_restarts", "2", "--folds", "3", "--cache_dir", str(place / "cache")]
    return [*words, "--picture", str(place / "k.svg")]


def test_two_kinds_of_people_are_two_groups(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_words(place), "--output", str(place / "k.json")]) == 0
    text = capsys.readouterr().out
    assert "2 <- chosen" in text
    assert "--num_experts 2" in text.splitlines()[-1]
    assert "<svg" in (place / "k.svg").read_text()
    assert json.loads((place / "k.json").read_text())["num_experts"] == 2


def test_confirm_trains_heads_for_the_best_two(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_words(place), "--confirm", "--num_train_epochs", "1", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    confirmation = found["confirmation"]
    assert "2" in confirmation["held_out"] and len(confirmation["held_out"]) == 2
    assert confirmation["num_users"] == 3
    better = confirmation["difference"] > confirmation["standard_error"]
    assert found["num_experts"] == sorted(map(int, confirmation["held_out"]))[better]


def test_without_users_there_is_nothing_to_count(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in _rows()]
    (place / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare), encoding="utf-8")
    words = _words(place)
    assert main([words[0], str(place / "bare.jsonl"), *words[2:]]) == 2
    assert "user" in capsys.readouterr().err
