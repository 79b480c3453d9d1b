"""The recipe from end to end on a tiny random model, chat included; its parser."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "dialogue"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module
    for name in ("dialogues", "run"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def hh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up dialogues where the recipe looks for the real ones; the first two do not fit."""
    folder = tmp_path / "data" / "hh"
    folder.mkdir(parents=True)
    rows = []
    for index in range(40):
        before = f"\n\nHuman: What color is the sky {index}?\n\nAssistant: It is blue.\n\nHuman: And the sea?"
        short, long = "The sea is green.", "The sea is green and the sky is blue and the sun is in the sky."
        if index == 0:
            before = "\n\nHuman: Where is the sun?"  # one question only
        if index == 1:
            long = "The sea is so green."  # no clear difference
        answers = (short, long) if index % 2 else (long, short)
        rows.append({k: f"{before}\n\nAssistant: {a}" for k, a in zip(("chosen", "rejected"), answers, strict=True)})
    with gzip.open(folder / "harmless_base_test.jsonl.gz", "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path / "data"))


def test_recipe_trains_and_chats(
    recipe: Callable[[str], ModuleType], make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    command = (
        f"--model {tmp_path / 'base'} --dialogues 12 --users 4 --comparisons 6 --epochs 2 --chats 1 "
        f"--max-new-tokens 4 --work-dir {tmp_path / 'work'} --output {tmp_path / 'results.json'}"
    )
    report = recipe("run").main(command.split())
    assert report["chat"]["answers"] == 4  # two questions to each of two people
    assert len(report["chat"]["brief"]["words"]) == 2
    assert report["arms"]["mixture"]["num_users"] == 4
    assert str(tmp_path) not in (tmp_path / "results.json").read_text(encoding="utf-8")


def test_dialogues_that_fit_are_found_and_judged_by_length(recipe: Callable[[str], ModuleType]) -> None:
    dialogues = recipe("dialogues")
    found = dialogues.read_dialogues()
    assert len(found) == 38
    assert [message["role"] for message in found[0].messages] == ["user", "assistant", "user"]
    rows = dialogues.judged(found, users=4, each=5, rng=np.random.default_rng(0))
    assert len(rows) == 20
    for row in rows:
        longer = len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
        assert longer == (row["group"] == "thorough") == (int(row["user"][1:]) % 2 == 1)


def test_a_text_without_turns_is_refused(recipe: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ValueError, match="expected turns"):
        recipe("dialogues").parse("What color is the sky?")
