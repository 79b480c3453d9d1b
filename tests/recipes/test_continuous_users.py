"""The recipe from end to end on few users, and its calibration's test statistic."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "continuous_users"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(RECIPE))

    def of_name(name: str) -> ModuleType:
        specification = importlib.util.spec_from_file_location(f"continuous_users_{name}", RECIPE / f"{name}.py")
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    yield of_name
    sys.modules.pop("calibration", None)


def test_a_small_run_reports_every_arm(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    options = ["--seeds", "0", "--alphas", "1.0", "--users", "20", "--samples", "2", "--steps", "3"]
    options += ["--encoder-steps", "3", "--calibration-users", "40", "--calibration-draws", "50"]
    report = load("run").main([*options, "--output", str(output)])
    assert json.loads(output.read_text()) == json.loads(json.dumps(report))
    (line,) = report["summary"]
    assert line["true_weights"] >= line["bayes"] - 0.05 and line["bayes"] > line["single"] - 0.05
    assert {len(values) for values in line["new"].values()} == {4}
    assert 0 <= min(report["calibration"]["importance_resampled"]["chi_square_p"]) <= 1


def test_the_chi_square_p_value_knows_uniform_ranks_from_others(load: Callable[[str], ModuleType]) -> None:
    calibration = load("calibration")
    ranks = torch.arange(2000) % calibration.NUM_RANKS
    assert calibration.chi_square_p(ranks) == pytest.approx(1.0)
    crowded = torch.where(ranks == 0, 1, ranks)
    assert calibration.chi_square_p(crowded) < 1e-6
    # 100 expected in each of 20 ranks; two ranks off by 10: statistic 2, p = 1 up to 1e-6 at 19 degrees of freedom.
    assert calibration.chi_square_p(torch.cat([ranks[:-10], torch.zeros(10, dtype=ranks.dtype)])) > 0.99


def test_types_and_blends_on_a_language_model(
    load: Callable[[str], ModuleType], make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    make_tiny_model().save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    options = "--dtype float32 --debates Firefox --max-words 30 --seeds 0 --users 8 --comparisons 8 --test-per-user 4"
    options += f" --epochs 1 --batch-size 64 --model {base} --work-dir {tmp_path / 'work'}"
    report = load("language_model").main([*options.split(), "--output", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(report))
    for kind in ("discrete", "continuous"):
        scores = report["summary"][kind]
        assert set(scores["accuracy"]) >= {"known weights", "single", "user", "membership"}
        # Nobody beats the truth in its own log-loss.
        best = min(scores["log_loss"][arm] for arm in ("single", "user", "membership"))
        assert scores["log_loss"]["known weights"] < best
