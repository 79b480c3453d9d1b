"""`prefmix compare`: the list, the example, mistakes with their lines, and the plan; the run has tests of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefmix.cli.compare_recipe import load_comparison
from prefmix.cli.main import main
from prefmix.cli.recipe import RecipeError
from prefmix.experiments.arms import all_arms
from prefmix.experiments.compare_settings import CompareSettings
from prefmix.experiments.comparison_run import read_sources


def test_the_list_names_every_arm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in all_arms()) and "shrinkage" in shown


def test_the_example_is_a_file_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    assert main(["compare", "--example", str(path)]) == 0
    settings = load_comparison(path, {"seeds": [7]})
    assert [arm.name for arm in settings.arms] == [arm.name for arm in all_arms().values()]
    assert settings.seeds == [7] and settings.options["num_train_epochs"] == 4
    assert main(["compare", "--example", str(path)]) == 2


def test_every_mistake_stands_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: smollm2\ntrian_data: x\nnum_experts: two\narms:\n  - mixtur\n  - mine: {like: single, shrinkage: 1}\n"
        "  - other: {like: mixture, num_expert: 3}\noptions:\n  num_trian_epochs: 2\n",
        encoding="utf-8",
    )
    with pytest.raises(RecipeError) as caught:
        load_comparison(path, {})
    shown = str(caught.value)
    for phrase in (":2: unknown field 'trian_data'", ":3: num_experts='two': expected a whole number",
                   ":9: unknown field 'num_trian_epochs'"):  # fmt: skip
        assert phrase in shown
    path.write_text(path.read_text(encoding="utf-8").replace("num_experts: two", "num_experts: 2"), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_comparison(path, {})
    shown = str(caught.value)
    for phrase in (":5: unknown arm 'mixtur' (did you mean 'mixture'?)", ":6: shrinkage: a setting of 'per_user'",
                   ":7: unknown field 'num_expert'"):  # fmt: skip
        assert phrase in shown


def test_values_that_cannot_work_are_found_at_their_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("arms:\n  - single\n  - mine: {like: mixture, num_experts: 0}\nseeds: [0, 0]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"c.yaml:4: seeds=\[0, 0\]"):
        load_comparison(path, {})
    with pytest.raises(RecipeError, match=r"c.yaml:3: arms.mine.num_experts=0"):
        load_comparison(path, {"seeds": [0]})


def test_the_plan_counts_what_would_run(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "user": "u"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 4), encoding="utf-8")
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {tmp_path / 'base'}\ntrain_data: {tmp_path / 'rows.jsonl'}\noutput_dir: {tmp_path / 'out'}\n"
        "arms: [reference, single, probe]\nseeds: [0, 1, 2]\nsearch: {learning_rate: [1e-3, 1e-2]}\n",
        encoding="utf-8",
    )
    capsys.readouterr()  # saving a model may print
    assert main(["compare", str(path), "--dry_run", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cells"] == 9 and plan["fits"] == 3 + 4 + 4 and "4 rows" in plan["train_data"]
    assert not (tmp_path / "out").exists()
    path.write_text(path.read_text().replace("arms: [", "arms: [oracle, hard_em_probe, "), encoding="utf-8")
    assert main(["compare", str(path), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "without what is left out" in shown and "oracle: the rows name no `group`" in shown
    assert "hard EM, probe; reference; single DPO; probe" in shown
    path.write_text(path.read_text().replace("arms: [", "arms: [oracle] #"), encoding="utf-8")
    assert main(["compare", str(path), "--dry_run"]) == 2
    assert "every one needs a `group`" in capsys.readouterr().err


def test_users_may_stand_in_another_column(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "rater": "r"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 4), encoding="utf-8")
    settings = CompareSettings(train_data=str(tmp_path / "rows.jsonl"), user_column="rater")
    rows = read_sources(settings)
    assert rows["train"] == [{"prompt": "a", "chosen": "b", "rejected": "c", "user": "r"}] * 4
    assert rows["test"] is None
    with pytest.raises(ValueError, match="no row has this column .user_column.*'rater'"):
        read_sources(replace(settings, user_column="ratr"))


def test_a_file_of_another_verb_is_sent_there_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, comparison = tmp_path / "recipe.yaml", tmp_path / "compare.yaml"
    assert main(["init", str(recipe)]) == 0 and main(["compare", "--example", str(comparison)]) == 0
    capsys.readouterr()
    assert main(["compare", str(recipe), "--dry_run"]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"error: {recipe} looks like a recipe of one training; run it with: prefmix train {recipe}"
    assert main(["train", str(comparison), "--dry_run"]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"error: {comparison} looks like a comparison of arms; run it with: prefmix compare {comparison}"
    comparison.write_text("arms: [single]\nnum_train_epochs: 3\n", encoding="utf-8")
    assert main(["compare", str(comparison), "--dry_run"]) == 2
    assert "looks like" not in capsys.readouterr().err, "one field at the wrong place"
