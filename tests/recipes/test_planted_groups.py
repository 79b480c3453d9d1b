"""The recipe from end to end on a tiny random model and made-up reviews."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

NEUTRAL_WORDS = ["the", "film", "story", "house", "sea", "sky", "girl", "forest", "time", "little", "near", "once"]
RECIPE = Path(__file__).parents[2] / "recipes" / "planted_groups"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(RECIPE))

    def load(name: str) -> ModuleType:
        specification = importlib.util.spec_from_file_location(f"planted_groups_{name}", RECIPE / f"{name}.py")
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reviews whose side shows in one word, where the recipe looks for the real ones."""
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "reviews"
    folder.mkdir(parents=True)
    with gzip.open(folder / "movies_train.jsonl.gz", "wt", encoding="utf-8") as lines:
        for index in range(120):
            label = ("pos", "neg")[index % 2]
            text = [("loved" if label == "pos" else "hated"), *rng.choice(NEUTRAL_WORDS, size=7)]
            lines.write(json.dumps({"text": " ".join(rng.permutation(text)), "label": label}) + "\n")
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path / "data"))


def test_recipe_trains_every_arm_and_writes_what_it_found(
    recipe: Callable[[str], ModuleType], reviews: None, base_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "results.json"
    arguments = (
        f"--setting 40x16 --seeds 0 --num-users 8 --comparisons 6 --texts-per-side 30 --num-words 6 --epochs 2 "
        f"--batch-size 16 --learning-rate 0.02 --probe-dim 8 --dtype float32 --model {base_folder} "
        f"--work-dir {tmp_path / 'work'} --output {output}"
    )
    recipe("run").main(arguments.split())
    printed = capsys.readouterr().out
    for phrase in ("single DPO", "mixture, random start", "oracle", "probe", "share of the gap", "vocabulary=seen"):
        assert phrase in printed
    written = json.loads(output.read_text(encoding="utf-8"))
    assert set(written["results"][0]["reports"]) == {"single DPO", "mixture", "mixture, random start", "oracle"}
    assert len(written["results"][0]["validation_log_loss"]["mixture"]) == 2
    assert not any((tmp_path / "work" / "runs" / "40x16").iterdir())
