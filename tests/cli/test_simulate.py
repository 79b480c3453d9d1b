"""The verb writes what the package reads, says what is possible, and leaves existing folders alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefmix.cli.main import main


def test_simulated_rows_are_read_by_validate_and_the_truth_stands_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "people"
    words = ["simulate", "--output", str(folder), "--texts", "features", "--num_users", "6", "--alpha", "0.5"]
    assert main([*words, "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    truth = json.loads((folder / "truth.json").read_text())
    assert printed["oracle"] == truth["oracle"]
    assert len(truth["weights"]) == 6
    assert main(["validate", str(folder / "train.jsonl")]) == 0
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err


def test_what_cannot_be_planted_is_a_mistake_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--output", str(tmp_path / "x"), "--noise", "0.7"]) == 2
    assert "noise=0.7" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
