"""The verb before training, on rows alone, and after it, on a tiny policy that has just been trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefmix.cli.main import main
from prefmix.evaluation.cached_states import StateCache
from prefmix.experiments.diagnose import scored_rows
from prefmix.experiments.read_rows import cached_rows
from prefmix.policy.mixture_policy import MixturePolicy

LOVED = [" I loved the film.", " it was great.", " The film was great, I loved it."]
HATED = [" I hated the film.", " it was bad.", " The film was bad, I hated it."]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    folder, rows = tmp_path_factory.mktemp("diagnose"), []
    make_tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    for user in range(8):
        for i in range(4):
            sides = (LOVED[(user + i) % 3], HATED[i % 3])
            chosen, rejected = sides if user % 2 == 0 else reversed(sides)
            row = {"prompt": "Write a review of the film.", "chosen": chosen, "rejected": rejected}
            rows.append(row | {"user": f"u{user}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["train", "--model", str(folder / "model"), "--train_data", str(folder / "rows.jsonl"), "--use_cpu", "true"]
    words += ["--output_dir", str(folder / "out"), "--num_experts", "2", "--expert_rank", "2", "--probe_dim", "4"]
    assert main([*words, "--num_train_epochs", "1", "--cache_dir", str(folder / "cache")]) == 0
    return folder


def test_rows_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["diagnose", str(place / "rows.jsonl"), "--output", str(place / "rows.json")]) == 0
    assert "simulate and refit" in capsys.readouterr().out
    found = {entry["check"]: entry for entry in json.loads((place / "rows.json").read_text())["findings"]}
    assert len(found) == 9
    assert found["comparisons per user"]["how_much"]["median"] == 4


def test_a_policy_on_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    words = ["diagnose", str(place / "rows.jsonl"), "--policy", str(place / "out"), "--probe_dim", "4"]
    assert main([*words, "--cache_dir", str(place / "cache"), "--format", "json"]) == 0
    found = {entry["check"]: entry for entry in json.loads(capsys.readouterr().out)["findings"]}
    checks = ["collapse", "length split", "displacement", "noise or minority", "calibration", "restart agreement"]
    assert list(found) == [*checks, "writing"]
    assert found["writing"]["how_much"]["kl_per_token_0"] > -0.1
    # Two kinds of people who want opposite texts: every good restart says who is who.
    assert found["restart agreement"]["how_much"]["ari"] > 0.9


def test_mistakes_in_rows_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n', encoding="utf-8")
    assert main(["diagnose", str(place / "bad.jsonl")]) == 2
    assert "rejected" in capsys.readouterr().err


def test_scores_from_cached_states_are_those_of_the_policy(place: Path) -> None:
    policy = MixturePolicy.from_pretrained(place / "out")
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    expected = scored_rows(policy, rows)  # `policy.score`, which reads token ids
    found = cached_rows(policy, rows, StateCache("disk", place / "cache"))
    for name, values in expected._asdict().items():
        np.testing.assert_allclose(getattr(found, name), values, atol=1e-4, err_msg=name)
