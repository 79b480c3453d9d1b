"""Quality against cost, from end to end on a tiny random model; its splits, votes and choice of rates."""

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

RECIPE = Path(__file__).parents[2] / "recipes" / "quality_and_cost"
MODULES = ("arguments", "arms", "films", "pairs", "runs", "tables", "run")
HEAD, TRL, BLOCKS = "head, hidden, r=16", "TRL LoRA, r=16", "LoRA, all blocks, r=16"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invented films that everybody rates alike, where the recipe looks for the real ones."""
    titles = [f"The {word} of {i} ({1930 + i})" for i, word in enumerate(["sky", "sea", "girl", "forest", "film"] * 12)]
    rng = np.random.default_rng(0)
    files = {
        "movies": [{"title": title, "year": None, "genres": ["Drama"]} for title in titles],
        "users": [{"user": f"u{i}", "age": 30, "sex": "F", "occupation": "artist"} for i in range(20)],
        "ratings": [
            {"user": f"u{i}", "movie": title, "rating": int(rng.integers(1, 6))} for i in range(20) for title in titles
        ],
    }
    folder = tmp_path / "data" / "movielens"
    folder.mkdir(parents=True)
    for name, records in files.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path / "data"))


@pytest.fixture
def command(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> list[str]:
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return (
        f"--model {tmp_path / 'base'} --training-pairs 8 --more-pairs 16 --max-held-out 20 "
        f"--work-dir {tmp_path / 'work'} --output {tmp_path / 'results.json'}"
    ).split()


def test_debates_are_dealt_whole(recipe: Callable[[str], ModuleType], tiny_tokenizer: Any) -> None:
    found = recipe("arguments").load_arguments(tiny_tokenizer, recipe("pairs").Sizes(100, 200, 300), seed=0)
    debates = [
        {row["prompt"].splitlines()[0] for row in rows} for rows in (found.many, found.validation.rows, found.test.rows)
    ]
    assert all(debates)
    assert not debates[0] & debates[1] and not debates[0] & debates[2] and not debates[1] & debates[2]
    assert found.few == found.many[: len(found.few)]


def test_recipe_trains_all_kinds_and_goes_on_where_it_stopped(
    recipe: Callable[[str], ModuleType], command: list[str], tmp_path: Path, capsys: Any
) -> None:
    run = recipe("run")
    stopped = run.main([*command, "--arms", HEAD, BLOCKS, TRL, "--max-cpu-minutes", "0"])
    assert stopped["runs"] == {} and "the same command goes on" in capsys.readouterr().out
    results = run.main([*command, "--arms", HEAD, BLOCKS, TRL])
    assert set(results["chosen"]) == {HEAD, BLOCKS, TRL}
    assert results["chosen"][TRL] == results["chosen"][BLOCKS]
    printed = capsys.readouterr().out
    assert all(name in printed for name in (HEAD, BLOCKS, TRL, "reference", "the older film"))
    written = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in written
    record = results["runs"][f"{TRL}, rate {results['chosen'][TRL]:g}, seed 0"]
    assert record["steps"] == results["rows"]["training_pairs"] // 4
    assert len(record["test"]["margins"]) == results["rows"]["test_pairs"]
    assert any(margin != 0 for margin in record["test"]["margins"])
    for name in ("accuracy", "log-loss"):
        ElementTree.fromstring((tmp_path / f"results-{name}.svg").read_text(encoding="utf-8"))
    run.main([*command, "--arms", HEAD, BLOCKS, TRL])  # all is there: nothing is trained again
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == json.loads(written)
    with pytest.raises(ValueError, match="other settings"):
        run.main([*command, "--training-pairs", "7"])


def test_held_out_films_are_in_no_other_part(recipe: Callable[[str], ModuleType], tiny_tokenizer: Any) -> None:
    found = recipe("films").load_films(tiny_tokenizer, recipe("pairs").Sizes(20, 60, None), seed=1)
    parts = [found.many, found.validation.rows, found.test.rows]
    films = [{row[name] for row in rows for name in ("chosen", "rejected")} for rows in parts]
    assert all(films)
    assert not films[0] & films[1] and not films[0] & films[2] and not films[1] & films[2]
    assert found.few == found.many[:20]
    rows = found.test.rows
    assert len(rows) == len(found.test.items)
    order = sorted(films[2])
    assert [order[i] for i in found.test.items[:, 1]] == [row["rejected"] for row in rows]


def test_interval_is_wide_where_one_film_decides_and_narrow_where_no_film_matters(
    recipe: Callable[[str], ModuleType],
) -> None:
    over_items, rng = recipe("tables").over_items, np.random.default_rng(0)
    films = np.array([[a, b] for a in range(30) for b in range(30) if a < b])
    of_film, of_pair = rng.normal(size=30), rng.normal(size=len(films))
    by_film = over_items(of_film[films].sum(axis=1), films)
    by_pair = over_items(of_pair, films)
    assert by_film.mean == pytest.approx(of_film[films].sum(axis=1).mean())
    # Var of the mean of f_a + f_b over all pairs is 4 Var f / n; of independent values 1 / pairs.
    assert by_film.se == pytest.approx(2 * of_film.std() / 30**0.5, rel=0.25)
    assert by_pair.se == pytest.approx(len(films) ** -0.5, rel=0.25)
    both = of_film[films].sum(axis=1) + of_pair
    error = both - both.mean()
    shared = sum(error[i] * error[j] for i in range(435) for j in range(435) if set(films[i]) & set(films[j]))
    assert over_items(both, films).se ** 2 == pytest.approx(shared / 435**2)
    assert over_items(np.ones(len(films)), films).se == pytest.approx(0, abs=1e-12)


def test_loss_of_a_pair_is_the_logistic_of_its_scaled_margin(recipe: Callable[[str], ModuleType]) -> None:
    tables = recipe("tables")
    found = tables.scores(np.array([1.0, -2.0, 0.0]), scale=3.0)
    np.testing.assert_array_equal(found.hits, [1, 0, 0.5])
    np.testing.assert_allclose(found.losses, np.log1p(np.exp([-3.0, 6.0, 0.0])))
    assert tables.judge(np.zeros(2), 1.0) == pytest.approx((0.5, np.log(2), np.log(2)))


def test_scale_undoes_margins_that_are_too_sure_and_silences_wrong_ones(recipe: Callable[[str], ModuleType]) -> None:
    tables, rng = recipe("tables"), np.random.default_rng(0)
    margins = rng.normal(size=20_000)
    margins *= np.where(rng.random(20_000) < 1 / (1 + np.exp(-margins)), 1, -1)  # calibrated as they are
    assert tables.best_scale(50 * margins) == pytest.approx(1 / 50, rel=0.05)
    assert tables.best_scale(-np.abs(margins)) == pytest.approx(0, abs=1e-4)
    assert tables.best_scale(np.zeros(3)) == 0


@pytest.mark.parametrize(("best", "tried"), [(1e-3, {3e-4, 1e-3, 3e-3}), (1e-1, {3e-4, 1e-3, 3e-3, 9e-3, 3e-2, 9e-2})])
def test_rate_at_the_edge_of_the_grid_asks_for_further_ones(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, best: float, tried: set[float]
) -> None:
    run, seen = recipe("run"), set()

    def find(study: Any, asked: Any, scored: bool) -> dict[str, Any]:
        seen.add(asked.rate)
        return {"validation": {"log_loss": abs(np.log(asked.rate / best))}}

    monkeypatch.setattr(run.Study, "_find", find)
    chosen = run.Study._choose_rate(object.__new__(run.Study), recipe("arms").all_arms()[HEAD])
    assert seen == tried
    assert chosen == min(tried, key=lambda rate: abs(np.log(rate / best)))
