"""The recipe on tiny worlds: cells are kept, tables come out, and the truth scores as it must."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "linear_proof"
MODULES = ("world", "tables", "run")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(RECIPE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("run")
    for name in MODULES:
        sys.modules.pop(name, None)


def test_cells_are_kept_and_the_tables_read_them(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opposed, recovery, restarts, path = recipe.opposed, recipe.recovery, recipe.restarts, tmp_path / "found.json"
    monkeypatch.setattr(recipe, "opposed", lambda each, seed: opposed(each, seed, rows=32 * each))
    monkeypatch.setattr(recipe, "recovery", lambda each, num, seed: recovery(min(each, 2), num, seed, users=12))
    monkeypatch.setattr(recipe, "restarts", lambda seed: restarts(seed, users=12, each=4, inner=3, reference=3))
    hard = recipe.hard_restarts
    monkeypatch.setattr(recipe, "hard_restarts", lambda seed: hard(seed, users=20, each=4, inner=3, reference=3))
    monkeypatch.setattr(recipe, "RIDGE", 4.0)
    monkeypatch.setattr(recipe, "TASTES", (1, 3))
    monkeypatch.setattr(recipe, "COMPARISONS", (2,))
    found = recipe.run(recipe.PARTS, 1, path)
    assert len(found) == 3 + 2 + 1 + 1 and json.loads(path.read_text()) == found
    monkeypatch.setattr(recipe, "opposed", None)
    assert recipe.run(("opposed",), 1, path) == found
    recipe.print_tables(found)
    shown = capsys.readouterr().out
    assert "Bayes rule" in shown and "ARI" in shown and "runs close 99%" in shown and "hard restarts" in shown


def test_a_spent_budget_begins_no_cell(recipe: ModuleType, tmp_path: Path) -> None:
    assert recipe.run(recipe.PARTS, 1, tmp_path / "found.json", budget=-1.0) == {}


def test_who_knows_the_tastes_scores_best_and_a_coin_scores_half(recipe: ModuleType) -> None:
    world_module = sys.modules["world"]
    generator = torch.Generator().manual_seed(0)
    world = world_module.draw_world(world_module.opposed_tastes(generator), 400, 8, generator)
    fresh = torch.randn(400, 20, world_module.FEATURES, generator=generator)
    log_w = world_module.true_log_weights(world)
    known = torch.nn.functional.one_hot(world.taste, 2).float().log()
    told = world_module.score(world, world.tastes, known, fresh)
    bayes = world_module.score(
        world, world.tastes, world_module.user_log_weights(world.data, world.tastes, log_w), fresh
    )
    coin = world_module.score(world, torch.zeros(2, world_module.FEATURES), known, fresh)
    assert told.accuracy > bayes.accuracy > 0.7 and told.log_loss < bayes.log_loss
    assert coin.log_loss == pytest.approx(0.6931, abs=1e-3)
    # log E = sum over the halves by hand, for the first user
    margins = world.data.difference[world.data.group == 0] @ world.tastes.T
    by_hand = (log_w.exp() * torch.sigmoid(margins).prod(0)).sum().log() / len(margins)
    alone = world.data.select(world.data.group == 0)._replace(num_groups=1)
    assert world_module.row_evidence(alone, world.tastes, log_w) == pytest.approx(float(by_hand), abs=1e-5)


def test_unequal_groups_have_their_shares_and_near_tastes_their_cosine(recipe: ModuleType) -> None:
    world_module = sys.modules["world"]
    generator = torch.Generator().manual_seed(0)
    tastes = world_module.near_tastes(3, 16, 0.5, generator)
    world = world_module.draw_world(tastes, 40, 2, generator, shares=(0.6, 0.3, 0.1))
    assert torch.bincount(world.taste).tolist() == [24, 12, 4]
    cosines = tastes @ tastes.T / world_module.SIZE**2
    assert torch.allclose(cosines, 0.5 * torch.ones(3, 3) + 0.5 * torch.eye(3), atol=1e-5)
