"""The recipe of all baselines from end to end on a tiny random model, made-up reviews and three arms."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "baselines" / "run.py"
WORDS = ["the", "film", "story", "house", "sea", "sky", "girl", "forest", "time", "little", "near", "once"]


def test_recipe_writes_table_picture_and_json_and_goes_on(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "reviews"
    folder.mkdir(parents=True)
    with gzip.open(folder / "movies_train.jsonl.gz", "wt", encoding="utf-8") as lines:
        for index in range(200):
            word = ("loved", "hated")[index % 2]
            text = " ".join(rng.permutation([word, *rng.choice(WORDS, size=13)]))
            lines.write(json.dumps({"text": text, "label": ("pos", "neg")[index % 2]}) + "\n")
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path / "data"))
    specification = importlib.util.spec_from_file_location("baselines_run", RECIPE)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    arguments = (
        f"--arms single low_rank_reward oracle --seeds 0 --users 6 --comparisons 5 --texts-per-side 20 --num-words 14 "
        f"--epochs 1 --rates 0.01 --dtype float32 --model {tmp_path / 'base'} --work-dir {tmp_path / 'work'} "
        f"--output {tmp_path / 'results'}"
    ).split()
    table = module.main(arguments)
    assert "single DPO" in table and "vocabulary=seen" in table
    written = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))
    assert [line["name"] for line in written["arms"]] == ["single DPO", "low-rank reward", "oracle"]
    assert str(tmp_path) not in json.dumps(written)
    monkeypatch.setattr(module, "review_groups", None)
    assert module.main(arguments).split("seeds 0")[0] == table.split("seeds 0")[0]
