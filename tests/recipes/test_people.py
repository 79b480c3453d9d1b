"""The recipe end to end on invented raters and a tiny model; its cuts, scores and tests by hand."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from prefmix.mixture.linear_em import ProbeData

RECIPE = Path(__file__).parents[2] / "recipes" / "people"
MODULES = ("sets", "states", "linear", "cells", "figures", "summary", "run", "heads", "unseen", "metadata")
WORDS = ["the", "film", "story", "house", "sea", "sky", "girl", "forest", "time", "little", "near", "once"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(RECIPE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def jokes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty jokes; odd and even people want the opposite."""
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "jester"
    folder.mkdir(parents=True)
    good = [index % 2 == 0 for index in range(30)]
    texts = [" ".join([("loved" if g else "hated"), *rng.choice(WORDS, size=4), str(i)]) for i, g in enumerate(good)]
    ratings = [
        {
            "user": f"u{user}",
            "joke": f"j{index}",
            "rating": (5.0 if good[index] == (user % 2 == 0) else -5.0) + rng.normal(),
        }
        for user in range(20)
        for index in range(30)
    ]
    for name, rows in (("ratings", ratings), ("jokes", [{"id": f"j{i}", "text": t} for i, t in enumerate(texts)])):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path / "data"))


def test_both_layers_run_and_report(
    load: Callable[[str], ModuleType], jokes: None, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load("run")
    monkeypatch.setattr(load("linear"), "GRIDS", {m: grid[:1] for m, grid in load("linear").GRIDS.items()})
    monkeypatch.setattr(load("cells"), "COUNTS", (0, 2))
    monkeypatch.setattr(load("summary"), "COUNTS", (0, 2))
    monkeypatch.setattr(load("sets"), "MIN_RANKED", 3)
    common = ["--model", str(base_folder), "--dtype", "float32", "--work-dir", str(tmp_path / "work")]
    options = ["--sets", "jester", "--seeds", "0", "1", "--dim", "4", "--output", str(tmp_path / "people.json")]
    report = run.main([*common, *options])
    found = json.loads((tmp_path / "people.json").read_text())["sets"]["jester"]
    assert found == json.loads(json.dumps(report["sets"]["jester"]))
    assert set(found["true"]) == set(load("linear").METHODS) and set(found["shuffled"]) == {
        "single",
        "user",
        "membership",
    }
    assert len(found["new_people"]["user"]) == 2 and 0 < found["ranking"]["own"]["ndcg"]["mean"] <= 1
    assert (tmp_path / "jester-new-people.svg").exists()
    heads = ["--set", "jester", "--rates", "0.01", "--epochs", "1", "--batch-size", "64"]
    scored = load("heads").main([*common, *heads, "--output", str(tmp_path / "heads.json")])
    assert set(scored["arms"]) == {"single", "user", "membership", "user, shuffled ids"}


def test_no_rating_is_on_both_sides_and_validation_stays(
    load: Callable[[str], ModuleType], jokes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = load("sets")
    monkeypatch.setattr(sets, "MIN_RANKED", 3)
    people = sets.load_set("jester")
    cuts = [sets.cut(people, seed) for seed in (0, 1)]

    def used(rows: list[Any]) -> set[tuple[str, str]]:
        return {(row["user"], row[side]) for row in rows for side in ("chosen", "rejected")}

    for split in cuts:
        parts = [used(split.known[part]) for part in ("train", "validation", "test")]
        assert all(parts) and not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        assert not {r["user"] for r in split.known["train"]} & {r["user"] for r in split.new["train"]}
        assert {(r.user, text) for r in split.ranked for text in r.texts} >= parts[2]
    both = {r["user"] for r in cuts[0].known["validation"]} & {r["user"] for r in cuts[1].known["validation"]}
    kept = [[r for r in split.known["validation"] if r["user"] in both] for split in cuts]
    assert kept[0] == kept[1] and cuts[0].known["train"] != cuts[1].known["train"]
    for seed in (0, 1):
        assert not used(cuts[1 - seed].known["validation"]) & used(cuts[seed].known["test"])


def test_shuffling_moves_authors_only(load: Callable[[str], ModuleType], jokes: None) -> None:
    sets = load("sets")
    rows = sets.cut(sets.load_set("jester"), 0).known["train"]
    shuffled = sets.shuffle_users(rows, 0)
    assert [row["chosen"] for row in shuffled] == [row["chosen"] for row in rows]
    assert sorted(row["user"] for row in shuffled) == sorted(row["user"] for row in rows)
    assert sum(a["user"] != b["user"] for a, b in zip(rows, shuffled)) > len(rows) / 2


def test_own_rewards_are_stationary_and_alone_without_rows(load: Callable[[str], ModuleType]) -> None:
    linear = load("linear")
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(30, 3, generator=generator)
    data = ProbeData(difference, torch.arange(30) % 4, torch.ones(30), 5)
    centre = torch.tensor([1.0, 0.0, -1.0])
    rewards = linear.own_rewards(data, centre, 2.0).requires_grad_()
    fitted = torch.nn.functional.logsigmoid((difference * rewards[data.group]).sum(1)).sum()
    (fitted - (rewards - centre).square().sum()).backward()
    assert rewards.grad is not None and float(rewards.grad.abs().max()) < 1e-4
    assert torch.equal(rewards[4], centre) and float((rewards[0] - centre).detach().norm()) > 0.05


def test_ranking_scores_by_hand(load: Callable[[str], ModuleType]) -> None:
    cells = load("cells")
    ratings = np.array([1.0, 3.0, 2.0])
    assert cells.ndcg(np.array([0.0, 2.0, 1.0]), ratings) == pytest.approx(1.0)
    worst = (1.0 / np.log2(3) + 2.0 / np.log2(4)) / (2.0 + 1.0 / np.log2(3))
    assert cells.ndcg(np.array([3.0, 1.0, 2.0]), ratings) == pytest.approx(worst)
    assert cells.top_is_liked(np.array([0.0, 1.0, 0.0]), ratings) == 1.0
    assert cells.top_is_liked(np.array([1.0, 0.0, 0.0]), ratings) == 0.0


def test_intervals_see_people_and_seeds(load: Callable[[str], ModuleType]) -> None:
    figures = load("figures")
    rng = np.random.default_rng(0)
    names, user = [f"p{i}" for i in range(60)], np.repeat(np.arange(60), 5)
    effect = rng.normal(size=60)
    cells = [(names, user, effect[user] + 0.01 * rng.normal(size=300)) for _ in range(3)]
    found = figures.interval(figures.collect(cells), resamples=2000)
    # Seeds repeat the same people: the width is that of 60 people, not of 900 rows.
    assert found.high - found.low == pytest.approx(2 * 1.96 * effect.std() / np.sqrt(60), rel=0.15)
    shifted = [(names, user, value + 1.0) for names, user, value in cells]
    sure = figures.interval(figures.collect(shifted), resamples=2000)
    assert sure.p_bootstrap < 0.01 and sure.p_signs < 0.01 and found.p_signs > 0.01
    assert sure.mean == pytest.approx(found.mean + 1.0)
    only_seeds = [(names, user, np.full(300, value)) for value in (-1.0, 0.0, 1.0)]
    assert figures.interval(figures.collect(only_seeds), resamples=2000).high > 0.5


def test_gains_of_some_people_are_those_of_their_rows(load: Callable[[str], ModuleType]) -> None:
    unseen, figures = load("unseen"), load("figures")
    user = np.array([0, 1, 2, 2, 1])
    losses = {"single": {"loss": np.zeros(5)}, "user": {"loss": np.array([1.0, 2.0, 3.0, 4.0, 6.0])}}
    runs = [{"users": ["a", "b", "c"], "user": user, "methods": losses}]
    assert figures.interval(unseen.gains(runs, "user", {"c", "b"})).mean == pytest.approx((2 + 3 + 4 + 6) / 4)
    assert figures.interval(unseen.gains(runs, "user", ["a"])).mean == pytest.approx(1.0)


def test_gates_of_metadata_are_scored_on_new_people(
    load: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Men like the one genre and women the other; their ages are noise."""
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "movielens"
    folder.mkdir(parents=True)
    films = [{"title": f"f{i}", "year": 1990 + i, "genres": [("Drama", "War")[i % 2]]} for i in range(12)]
    users = [
        {"user": f"u{u}", "age": int(rng.integers(18, 80)), "sex": "MF"[u % 2], "occupation": "other"}
        for u in range(50)
    ]
    ratings = [
        {"user": f"u{u}", "movie": f"f{i}", "rating": 5 if u % 2 == i % 2 else 1} for u in range(50) for i in range(12)
    ]
    for name, rows in (("movies", films), ("users", users), ("ratings", ratings)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path / "data"))
    options = ["--people", "30", "--new", "20", "--experts", "2", "--seeds", "0", "1"]
    report = load("metadata").main([*options, "--output", str(tmp_path / "metadata.json")])
    found = report["cells"]["30 people, K=2"]
    assert [cell["kept"] for cell in found] == [["sex"], ["sex"]]
    assert all(cell["gain"]["relevance"] > 0.4 for cell in found)  # half of the people would get the other's expert
    assert json.loads((tmp_path / "metadata.json").read_text())["cells"] == report["cells"]
    assert "'sex': 2" in capsys.readouterr().out
