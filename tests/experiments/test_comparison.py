"""A comparison from end to end: cells are kept and found, the table's figures are those of the cells, mistakes show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.experiments.conftest import opposed_rows

from prefmix.experiments.arms import Arm, all_arms, with_options
from prefmix.experiments.compare_settings import CompareSettings, settings_problems
from prefmix.experiments.comparison_files import write_comparison
from prefmix.experiments.comparison_run import run_comparison
from prefmix.experiments.comparison_table import comparison_lines
from prefmix.experts.base_model import BaseModel

OPTIONS = {
    "num_train_epochs": 2, "per_device_train_batch_size": 16, "probe_dim": 4, "probe_restarts": 2, "expert_rank": 2,
    "cache_states": "memory",
}  # fmt: skip


def settings_for(base: BaseModel, folder: Path, **changes: Any) -> CompareSettings:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in opposed_rows(10, 12)), encoding="utf-8")
    arms = all_arms(2, 2)
    given: dict[str, Any] = {
        "model": base.source,
        "train_data": str(rows),
        "output_dir": str(folder / "found"),
        "arms": [arms["reference"], arms["single"], arms["low_rank_reward"], arms["oracle"]],
        "seeds": [0, 1],
        "search": {"learning_rate": [1e-2, 3e-2]},
        "options": OPTIONS,
    }
    return CompareSettings(**(given | changes))


def test_a_comparison_runs_goes_on_and_tells_one_table(tiny_base: BaseModel, tmp_path: Path) -> None:
    settings, told = settings_for(tiny_base, tmp_path), list[str]()
    assert settings_problems(settings) == []
    cells = run_comparison(settings, base=tiny_base, say=told.append)
    assert len(cells) == 8 and not any("(found)" in line for line in told)
    first, second = (next(c for c in cells if c["arm"] == "single DPO" and c["seed"] == seed) for seed in (0, 1))
    assert len(first["search"]) == 2 and len(second["search"]) == 1 and second["options"] == first["options"]
    best = min(first["search"], key=lambda entry: entry["validation_log_loss"])
    assert best["point"]["learning_rate"] == first["options"]["learning_rate"]
    (tmp_path / "found" / "cells").glob("oracle*seed1.json").__next__().unlink()
    told.clear()
    again = run_comparison(settings, base=tiny_base, say=told.append)
    assert sum("(found)" in line for line in told) == 7
    assert [c["test"]["personalised"] for c in again] == [c["test"]["personalised"] for c in cells]
    text = write_comparison(settings, cells, "tiny")
    written = json.loads((tmp_path / "found" / "results.json").read_text(encoding="utf-8"))
    assert len(written["cells"]) == 8 and "test" not in written["cells"][0] and "oracle" in text
    assert (tmp_path / "found" / "comparison.svg").read_text(encoding="utf-8").startswith("<svg")
    with pytest.raises(ValueError, match="another options"):
        run_comparison(settings_for(tiny_base, tmp_path, options=OPTIONS | {"expert_rank": 3}), base=tiny_base)


def cell(arm: str, seed: int, logit: np.ndarray) -> dict[str, Any]:
    numbers = {"logit": logit.tolist(), "log_prob": (-np.logaddexp(0, -logit)).tolist()}
    people = {"user": [f"u{i // 4}" for i in range(len(logit))], "group": ["ab"[i // 4 % 2] for i in range(len(logit))]}
    return {
        "arm": arm,
        "seed": seed,
        "cpu_seconds": 2.0 + seed,
        "memory": {"peak_mib": 10.0, "extra_mib": 1.0 + seed, "how": "x"},
        "test": people | {"population": numbers, "personalised": numbers},
        "new_users": people | {"by_context": {"0": numbers, "4": numbers}},
    }


def test_the_lines_are_means_differences_and_shares_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    right = {name: rng.random((2, 400)) < share for name, share in (("single DPO", 0.5), ("x", 0.7), ("oracle", 0.9))}
    cells = [cell(name, s, np.where(of[s], 1.0, -1.0)) for name, of in right.items() for s in (0, 1)]
    lines = {line.name: line for line in comparison_lines(cells)}
    line, means = lines["x"], {name: float(of.mean()) for name, of in right.items()}
    assert line.personalised.mean == pytest.approx(means["x"])
    assert line.accuracy_gain is not None and line.log_loss_gain is not None
    assert line.accuracy_gain.mean == pytest.approx(means["x"] - means["single DPO"]) and line.accuracy_gain.p < 0.05
    assert line.log_loss_gain.mean == pytest.approx(means["single DPO"] - means["x"])
    assert line.share is not None and line.share.share is not None
    gap = means["oracle"] - means["single DPO"]
    assert line.share.share == pytest.approx((means["x"] - means["single DPO"]) / gap)
    assert lines["single DPO"].accuracy_gain is None and lines["oracle"].share is None
    groups = np.arange(400) // 4 % 2
    assert line.worst_group == pytest.approx(min(right["x"][:, groups == g].mean() for g in (0, 1)))
    assert line.cpu_seconds == 2.5 and line.extra_mib == 2.0 and set(line.new_users) == {0, 4}


def test_every_mistake_of_the_settings_is_named(tiny_base: BaseModel, tmp_path: Path) -> None:
    arms = all_arms(2)
    wrong = settings_for(tiny_base, tmp_path, seeds=[1, 1], test_share=0.9, options={"seed": 3}, search={"beta": []})
    found = "\n".join(settings_problems(wrong))
    for phrase in ("seeds=[1, 1]", "test_share", "options.seed", "search="):
        assert phrase in found
    arm = with_options(arms["group_robust"], "mine", {"robust_step": -1.0, "num_experts": 0})
    lines = settings_problems(settings_for(tiny_base, tmp_path, arms=[arm]))
    assert any(line.startswith("arms.mine.num_experts=0") for line in lines)
    assert any(line.startswith("arms.mine.robust_step=-1.0") for line in lines)


def test_the_grid_has_as_many_points_for_all_and_leaves_an_arms_own_fields_alone(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    settings, arms = settings_for(tiny_base, tmp_path, search={"learning_rate": [1, 2], "beta": [3.0, 4.0]}), all_arms()
    for name in ("single", "per_user", "soup", "probe", "low_rank_reward", "vpl"):
        assert len(settings.candidates(arms[name])) == 4
    assert settings.candidates(arms["reference"]) == [arms["reference"]]
    own = with_options(arms["single"], "own", {"beta": 0.5})
    assert [arm.options["beta"] for arm in settings.candidates(own)] == [0.5, 0.5]
    assert isinstance(own, Arm)
