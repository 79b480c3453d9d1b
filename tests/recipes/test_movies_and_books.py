"""The recipe from end to end on a tiny random model and made-up reviews; its rows, its classifier and its shares."""

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

RECIPE = Path(__file__).parents[2] / "recipes" / "movies_and_books"
WORDS = {"movies": ["film", "sky", "sea"], "books": ["story", "house", "forest"], "dvd": ["time", "near", "once"]}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module
    for name in ("domains", "routing", "run"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reviews whose domain and side show in their words, where the recipe looks for the real ones."""
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "reviews"
    folder.mkdir(parents=True)
    for file, domains in (("movies_train", ["movies"]), ("books_dvd", ["books", "dvd"])):
        with gzip.open(folder / f"{file}.jsonl.gz", "wt", encoding="utf-8") as lines:
            for index in range(150 * len(domains)):
                domain, label = domains[index % len(domains)], ("pos", "neg")[index // len(domains) % 2]
                words = [*rng.choice(WORDS[domain], size=20), "loved" if label == "pos" else "hated", str(index)]
                lines.write(json.dumps({"domain": domain, "text": " ".join(words), "label": label}) + "\n")
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path / "data"))


def test_recipe_trains_gates_and_leaves_experts_alone(
    recipe: Callable[[str], ModuleType], make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    command = (
        f"--model {tmp_path / 'base'} --seeds 0 --dtype float32 --train 24 --validation 8 --test 12 --people 6 "
        f"--person-rows 4 "
        f"--epochs 2 --metadata-epochs 2 --learning-rate 0.01 --work-dir {tmp_path / 'work'} "
        f"--output {tmp_path / 'results.json'}"
    ).split()
    report = recipe("run").main(command)
    (seed,) = report["seeds"]
    assert len(seed["gate"]["routes_right"]) == 12
    before, after = seed["metadata"]["experts_sha256"]
    assert before == after
    assert seed["metadata"]["figures"]["oracle"].keys() == {"accuracy", "log_loss", "reward"}
    for name in ("movies", "books"):
        arms = report["summary"]["domains"][name]
        assert len(seed["domains"][name]["own DPO"]["reward"]) == 6
        assert arms["MoE-DPO"]["accuracy"] != arms["MoE-DPO"]["log_loss"]
        difference = arms["MoE-DPO minus own DPO"]["reward"]
        assert difference["num_rows"] == 6 and difference["each"] == pytest.approx([difference["mean"]])
        assert difference["seeds_low"] <= difference["mean"] <= difference["seeds_high"]
    ElementTree.fromstring((tmp_path / "results-prompts.svg").read_text(encoding="utf-8"))
    written = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in written
    recipe("run").main(command)  # nothing is trained again
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == written
    with pytest.raises(ValueError, match="other settings"):
        recipe("run").main([*command, "--train", "26"])


def test_own_dpo_stops_at_one_epoch_for_all_domains(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fits = recipe("run"), []
    curves = {"own DPO movies": [0.6, 0.5, 0.52], "own DPO books": [0.69, 0.66, 0.62]}  # together best at the third

    def fit(place: Any, name: str, options: dict[str, Any], splits: Any) -> Any:
        losses = curves[name] if splits.validation is not None else []
        fits.append((name, options.get("num_train_epochs"), len(losses)))
        return run.FittedArm(None, int(np.argmin(losses)) + 1 if losses else 0, losses, Path())

    monkeypatch.setattr(run, "_fit", fit)
    monkeypatch.setattr(run, "_of_domain", lambda splits, domain: splits)
    place = run.Place(None, run.Splits(None, "validation", None), None, {}, Path(), 0)
    found = run.own_dpo(place, 8)
    assert {name: arm.epoch for name, arm in found.items()} == {"movies": 3, "books": 3}
    assert found["movies"].validation == curves["own DPO movies"]
    assert fits == [("own DPO movies", None, 3), ("own DPO books", None, 3), ("own DPO movies", 3, 0)]


def test_no_review_stands_twice_and_tastes_are_opposed(recipe: Callable[[str], ModuleType]) -> None:
    domains = recipe("domains")
    rows = domains.draw_rows(domains.Sizes(20, 6, 10, 6, 2, 2, opening_words=19, end_words=3), seed=3)
    ends = [row[side] for part in rows for row in part for side in ("chosen", "rejected")]
    assert len(set(ends)) == len(ends)
    for part in rows:
        for row in part:
            liked, other = ("loved", "hated") if row["group"] == "movies" else ("hated", "loved")
            assert liked in row["chosen"] and other in row["rejected"]
    for row in rows.train:
        kind = domains.KINDS[row["group"]]
        assert row["prompt"].startswith(f"{kind.title()} review. ") and f"Another {kind} review" in row["prompt"]
        assert set(row["prompt"].split("...")[0].split()[2:]) <= set(WORDS[row["group"]])
    quoted = domains.draw_rows(domains.Sizes(20, 6, 10, 6, 2, 2, opening_words=19, end_words=3, named=False), seed=3)
    assert not any(row["prompt"].startswith(("Film", "Book")) for row in quoted.train)
    for row in rows.people_train + rows.people_test:
        assert row["metadata"]["user_club"] in domains.CLUBS[row["group"]]
        assert row["prompt"] == domains.NEUTRAL_PROMPT
    assert not {r["user"] for r in rows.people_train} & {r["user"] for r in rows.people_test}
    with pytest.raises(ValueError, match="too few"):
        domains.draw_rows(domains.Sizes(400, 6, 10, 6, opening_words=5, end_words=5), seed=0)


def test_classifier_finds_a_plane_and_ignores_constant_columns(recipe: Callable[[str], ModuleType]) -> None:
    routing, rng = recipe("routing"), np.random.default_rng(0)
    plane = rng.normal(size=8)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        states = rng.normal(size=(count, 8))
        labels = (states @ plane > 0.3).astype(int)
        return np.c_[states, np.ones(count)], labels

    classifier = routing.fit_classifier(draw(400), draw(200))
    states, labels = draw(1000)
    assert (classifier.predict(states) == labels).mean() > 0.95
    shuffled = routing.fit_classifier((states, rng.permutation(labels)), draw(200))
    assert abs((shuffled.predict(states) == labels).mean() - 0.5) < 0.2


def test_share_and_assignment(recipe: Callable[[str], ModuleType]) -> None:
    routing = recipe("routing")
    assert routing.share_of_oracle(0.74, 0.5, 0.75) == pytest.approx(0.96)
    assert routing.share_of_oracle(0.51, 0.7, 0.5) == pytest.approx(0.95)  # losses: less is better
    assert routing.share_of_oracle(0.5, 0.5, 0.5) is None
    log_weights = np.log([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    assert routing.expert_of_domain(log_weights, np.array([0, 1, 1])).tolist() == [0, 1]
    assert routing.expert_of_domain(log_weights, np.array([1, 0, 0])).tolist() == [1, 0]
