"""The floors against closed forms and random models; the recipe from end to end on a tiny random model."""

from __future__ import annotations

import importlib
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "beyond_one_model"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module
    for name in ("preferences", "rows", "run"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("wins", "of"), [(3, 5), (2, 3), (9, 10)])
def test_floors_of_a_cycle_are_their_closed_forms(recipe: Callable[[str], ModuleType], wins: int, of: int) -> None:
    preferences, p = recipe("preferences"), wins / of
    world = preferences.cycle(wins, of)
    assert preferences.single_floor(world) == pytest.approx(math.log(2), abs=1e-9)
    reached = min(p, 2 / 3)  # what a random utility model can have
    found = preferences.random_utility_floor(world)
    assert found.gap < 1e-7
    assert found.value == pytest.approx(-p * math.log(reached) - (1 - p) * math.log(1 - reached), abs=1e-7)
    assert preferences.entropy(world) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_two_thirds_is_the_largest_cycle_and_no_mixture_of_rewards_has_more(
    recipe: Callable[[str], ModuleType],
) -> None:
    preferences, rng = recipe("preferences"), np.random.default_rng(0)
    floors = {world: preferences.random_utility_floor(world).value for world in preferences.WORLDS}
    assert preferences.largest_cycle() == pytest.approx(2 / 3)
    for scale in (0.3, 3.0, 30.0):
        rewards, weights = rng.normal(scale=scale, size=(100, 4, 3)), rng.dirichlet(np.ones(4), size=100)
        chance = (weights[..., None] / (1 + np.exp(-preferences.margins(rewards)))).sum(1)
        assert chance.min(axis=1).max() <= 2 / 3
        for world, floor in floors.items():
            assert min(preferences.cross_entropy(world.chance, row) for row in chance) >= floor - 1e-7


def test_no_single_reward_is_below_its_floor_and_rankings_reach_the_polarised_entropy(
    recipe: Callable[[str], ModuleType],
) -> None:
    preferences, rng = recipe("preferences"), np.random.default_rng(1)
    single = 1 / (1 + np.exp(-preferences.margins(rng.normal(scale=2, size=(500, 3)))))
    for world in preferences.WORLDS:
        losses = [preferences.cross_entropy(world.chance, row) for row in single]
        floor = preferences.single_floor(world)
        assert floor <= min(losses) < floor + 0.02
    world = preferences.POLARISING
    assert preferences.single_floor(world) > preferences.entropy(world) + 0.04
    assert preferences.random_utility_floor(world).value == pytest.approx(preferences.entropy(world), abs=1e-7)


def test_rows_are_the_population(recipe: Callable[[str], ModuleType]) -> None:
    preferences, rows = recipe("preferences"), recipe("rows")
    for world in preferences.WORLDS:
        weight = np.array([row["weight"] for row in rows.population_rows(world)])
        assert -(weight * np.log(weight)).sum() / weight.sum() == pytest.approx(preferences.entropy(world))
    camps = rows.camp_expectation(4)
    weight = np.array([row["weight"] for row in camps])
    assert -(weight * np.log(weight)).sum() / weight.sum() == pytest.approx(rows.camp_floor())
    wins: dict[tuple[str, str], float] = {}
    for row in camps:
        wins[row["chosen"], row["rejected"]] = wins.get((row["chosen"], row["rejected"]), 0) + row["weight"]
    assert all(count == pytest.approx(wins[b, a]) for (a, b), count in wins.items())  # opposite camps cancel


def test_em_on_a_table_of_rewards_reaches_the_floors(recipe: Callable[[str], ModuleType]) -> None:
    preferences, run = recipe("preferences"), recipe("run")
    world = preferences.cycle(3, 5)
    one, two, three = (run.tabular(world, k, seed=0) for k in (1, 2, 3))
    assert one == pytest.approx(math.log(2), abs=1e-6)
    assert preferences.entropy(world) + 0.003 < two < one - 0.01
    assert three == pytest.approx(preferences.entropy(world), abs=1e-4)


def test_recipe_trains_all_arms_and_goes_on_where_it_stopped(
    recipe: Callable[[str], ModuleType],
    make_tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    run = recipe("run")
    monkeypatch.setattr(run, "WORLDS", run.WORLDS[:1])
    monkeypatch.setattr(run, "lowest_mixture", lambda world, k: math.nan)
    command = (
        f"--model {tmp_path / 'base'} --experts 1 2 --seeds 0 --steps 40 --users 4 --work-dir {tmp_path / 'work'} "
        f"--output {tmp_path / 'results.json'}"
    ).split()
    results = run.main(command)
    trained = results["trained"]["cycle, p = 3/5"]
    assert set(trained) == {"1", "2", "3, bt_lse", "3, policy"}
    # One reward cannot be below log 2; two experts already are.
    assert trained["1"]["0"] >= math.log(2) - 1e-6
    assert trained["3, policy"]["0"] >= math.log(2) - 1e-6
    assert set(results["camps"]) == {"1", "2, user", "2, pair"}
    assert results["camps"]["2, user"]["0"] < results["camps"]["1"]["0"]
    assert "random-utility floor" in capsys.readouterr().out
    ElementTree.fromstring((tmp_path / "results-0.svg").read_text(encoding="utf-8"))
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(written)
    assert run.main(command)["trained"] == written["trained"]  # nothing is trained again
    with pytest.raises(ValueError, match="other settings"):
        run.main([*command, "--steps", "3"])
