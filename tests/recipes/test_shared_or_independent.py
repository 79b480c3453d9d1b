"""The recipe from end to end on a tiny random model: fresh processes, parameters by kind, going on."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "shared_or_independent"
WORDS = ["the", "film", "story", "house", "sea", "sky", "girl", "forest", "time", "little", "near", "once"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module
    for name in ("cell", "run"):
        sys.modules.pop(name, None)


@pytest.fixture
def command(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Arguments on a tiny model and reviews whose side shows in one word."""
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "reviews"
    folder.mkdir(parents=True)
    with gzip.open(folder / "movies_train.jsonl.gz", "wt", encoding="utf-8") as lines:
        for index in range(80):
            label = ("pos", "neg")[index % 2]
            text = [("loved" if label == "pos" else "hated"), *rng.choice(WORDS, size=7)]
            lines.write(json.dumps({"text": " ".join(rng.permutation(text)), "label": label}) + "\n")
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path / "data"))
    return (
        f"--models {tmp_path / 'base'} --users 4 --comparisons 4 --num-words 6 --texts-per-side 30 --epochs 1 "
        f"--work-dir {tmp_path / 'work'} --output {tmp_path / 'results.json'}"
    ).split()


def test_recipe_measures_in_a_fresh_process_and_goes_on(
    recipe: Callable[[str], ModuleType], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe("run")
    report = run.main([*command, "--kinds", "heads"])
    heads = report["cells"]["base"]["heads"]
    assert heads["peak_memory_mb"] >= heads["memory_before_mb"] > 0
    assert len(heads["test"]["hits"]) == len(heads["test"]["user"]) == 16
    monkeypatch.setattr(run, "_in_fresh_process", lambda args, model, kind: heads | {"rate": 1.0})
    report = run.main([*command, "--kinds", "heads", "independent"])
    assert report["cells"]["base"]["heads"]["rate"] == heads["rate"]  # not run again
    assert "+0.0 [+0.0, +0.0]" in run.table(report)
    ElementTree.fromstring((tmp_path / "results-base.svg").read_text(encoding="utf-8"))
    assert str(tmp_path) not in (tmp_path / "results.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="other settings"):
        run.main([*command, "--epochs", "2"])


def test_every_kind_trains_what_it_says(
    recipe: Callable[[str], ModuleType], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = recipe("cell")
    # One rate for all but heads: a choice of two is a choice.
    kinds = {name: kind._replace(rates=kind.rates[: 2 if name == "heads" else 1]) for name, kind in cell.KINDS.items()}
    monkeypatch.setattr(cell, "KINDS", kinds)
    found = {}
    for kind in cell.KINDS:
        task = cell.Task(users=4, comparisons=4, num_words=6, texts_per_side=30, epochs=1, batch_size=16, seed=0)
        found[kind] = cell.run_cell(str(tmp_path / "base"), kind, task, tmp_path / kind)
    trained = [found[kind]["trained_parameters"] for kind in cell.KINDS]
    assert trained[0] == 2 * 2 * 16 * 32  # K heads of rank 16 over 32 dimensions
    assert trained[0] < trained[1]
    independent = found["independent"]
    assert independent["served_parameters"] == independent["trained_parameters"]
    base = found["heads"]["served_parameters"] - found["heads"]["trained_parameters"]
    assert independent["trained_parameters"] == pytest.approx(2 * base, rel=0.5)  # a tied head may count twice
    for kind, result in found.items():
        assert result["rate"] in cell.KINDS[kind].rates
        best = min(min(entry["validation"]) for entry in result["rates"].values())
        assert min(result["rates"][f"{result['rate']:g}"]["validation"]) == best
