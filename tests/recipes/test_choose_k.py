"""The recipe from end to end, with few people and one seed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "choose_k" / "run.py"


def test_the_recipe_writes_what_it_found(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("choose_k_run", RECIPE)
    assert specification is not None and specification.loader is not None
    recipe = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(recipe)
    words = ["--settings", "2 orthogonal", "--num_seeds", "1", "--num_users", "40", "--comparisons_per_user", "12"]
    report = recipe.main([*words, "--output", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(report))
    found = report["settings"]["2 orthogonal"]
    assert found["bar"] == 18
    assert found["of"] == 1
    assert found["found"] == int(found["runs"][0]["num_experts"] == 2)
    assert len(found["runs"][0]["held_out"]) >= 4
