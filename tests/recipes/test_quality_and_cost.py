"""Quality against cost, from end to end on a tiny random model; its splits, votes and choice of rates."""

from __future__ import annotations

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
MODULES = ("arms", "debates", "runs", "tables", "run")
HEAD, TRL, BLOCKS = "head, hidden, r=16", "TRL LoRA, r=16", "LoRA, all blocks, r=16"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def command(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> list[str]:
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return (
        f"--model {tmp_path / 'base'} --max-words 25 --max-sides 4 --pairs-per-side 2 "
        f"--work-dir {tmp_path / 'work'} --output {tmp_path / 'results.json'}"
    ).split()


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
    assert all(name in printed for name in (HEAD, BLOCKS, TRL, "reference", "most judges"))
    written = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in written
    record = results["runs"][f"{TRL}, rate {results['chosen'][TRL]:g}, seed 0"]
    assert record["steps"] == 2 * int(np.ceil(results["rows"]["training_pairs"] / 4))
    assert len(record["test"]["margins"]) == results["rows"]["test_pairs"]
    assert any(margin != 0 for margin in record["test"]["margins"])
    for name in ("accuracy", "log-loss"):
        ElementTree.fromstring((tmp_path / f"results-{name}.svg").read_text(encoding="utf-8"))
    run.main([*command, "--arms", HEAD, BLOCKS, TRL])  # all is there: nothing is trained again
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == json.loads(written)
    with pytest.raises(ValueError, match="other settings"):
        run.main([*command, "--pairs-per-side", "3"])


def test_held_out_arguments_are_in_no_other_part(recipe: Callable[[str], ModuleType], tiny_tokenizer: Any) -> None:
    debates = recipe("debates").load_debates(
        tiny_tokenizer, max_words=25, pairs_per_side=3, min_agreement=0.75, max_sides=5, seed=1
    )
    training = {row[name] for row in debates.many for name in ("chosen", "rejected")}
    held = [_arguments(pairs) for pairs in (debates.validation, debates.test)]
    decode = tiny_tokenizer.decode
    training_texts = {decode(tiny_tokenizer(text).input_ids) for text in training}
    assert training and all(held)
    assert not training_texts & {decode(ids) for ids in held[0] | held[1]}
    assert not held[0] & held[1]
    assert all(row in debates.many for row in debates.few)


def _arguments(pairs: Any) -> set[tuple[int, ...]]:
    """Completions without their end-of-sequence token."""
    return {tuple(ids[:-1]) for ids in pairs.table.texts.completion_ids}


def test_votes_are_counted_whichever_argument_was_named_first(recipe: Callable[[str], ModuleType]) -> None:
    def row(chosen: str, rejected: str, tie: bool = False) -> dict[str, Any]:
        return {"prompt": "p", "chosen": chosen, "rejected": rejected, "tie": tie, "metadata": {"topic": "t"}}

    (pair,) = recipe("debates").judged_pairs([row("b", "a"), row("a", "b"), row("b", "a"), row("a", "b", tie=True)])
    assert pair.texts == ("b", "a") and pair.votes == (2, 1)
    assert pair.agreement == pytest.approx(2 / 3)


def test_every_vote_is_one_judgement(recipe: Callable[[str], ModuleType]) -> None:
    debates, tables = recipe("debates"), recipe("tables")
    pairs = debates.Pairs(table=None, votes=np.array([[3, 1], [2, 0]]), topic=np.array([4, 7]))
    found = tables.judgements(np.array([1.0, -2.0]), pairs)
    np.testing.assert_array_equal(found.hits, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(found.side, [4, 4, 4, 4, 7, 7])
    np.testing.assert_allclose(found.losses, np.log1p(np.exp([-1.0, -1.0, -1.0, 1.0, 2.0, 2.0])))
    assert tables.judge(np.zeros(2), pairs) == pytest.approx((0.5, np.log(2)))


@pytest.mark.parametrize(("best", "tried"), [(3e-3, {1e-3, 3e-3, 1e-2}), (1e-1, {1e-3, 3e-3, 1e-2, 3e-2, 9e-2})])
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
