"""Evaluation from cached trunk states: the same figures, and not one token read twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmix.evaluation import evaluator
from prefmix.evaluation.cached_states import StateCache
from prefmix.evaluation.evaluator import evaluate
from prefmix.experts import trunk_cache
from prefmix.experts.base_model import BaseModel, content_sha256
from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

ANSWERS = [" It is blue.", " It is green.", " In the sea.", " Yes, it is."]


def make_rows(start: int = 0) -> list[dict[str, Any]]:
    pairs = [(start + i) % 12 for i in range(12)]
    return [
        {"prompt": f"Sky {p % 3}?", "chosen": ANSWERS[p % 4], "rejected": ANSWERS[(p + 1) % 4], "user": f"u{p % 4}"}
        for p in pairs
    ]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each pass over a table read."""
    counts: list[int] = []
    original = trunk_cache.read_texts

    def counted(model: Any, texts: Any, text_ids: Any, **options: Any) -> Any:
        counts.append(len(text_ids))
        return original(model, texts, text_ids, **options)

    monkeypatch.setattr(trunk_cache, "read_texts", counted)
    return counts


@pytest.fixture
def train(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., MixtureTrainer]:
    """A short run over a tiny model; `cache` is its folder of trunk states."""

    def run(**fields: Any) -> MixtureTrainer:
        model = make_tiny_model()
        base = BaseModel(model, tiny_tokenizer, "<tiny>", content_sha256(model))
        defaults = {"num_experts": 2, "expert_rank": 2, "max_steps": 2, "learning_rate": 0.05, "probe_dim": 4}
        options = defaults | {"cache_dir": str(tmp_path / "cache"), "use_cpu": True, "disable_tqdm": True} | fields
        args = MixtureConfig(str(tmp_path / "out"), save_strategy="no", overwrite_output_dir=True, **options)
        trainer = MixtureTrainer(base, args, train_dataset=make_rows(), eval_dataset=make_rows(3)[:6])
        trainer.train()
        return trainer

    return run


def test_figures_are_those_without_a_cache_and_texts_of_training_are_not_read_again(
    train: Callable[..., MixtureTrainer], read: list[int], tmp_path: Path
) -> None:
    policy = train().policy
    cache = StateCache("disk", tmp_path / "cache")
    read.clear()
    cached = evaluate(policy, make_rows(3)[:6], cache=cache)
    context = evaluate(policy, make_rows(3)[:6], context_rows=make_rows(), cache=cache)
    assert sum(read) == 0, "every text stood in the tables that training cached"
    new = evaluate(policy, [row | {"prompt": "Sea?"} for row in make_rows()], cache=cache)
    assert 0 < sum(read) <= 4
    plain = evaluate(policy, make_rows(3)[:6])
    for name, predictions in plain.predictions.items():
        assert cached.predictions[name].logit == pytest.approx(predictions.logit, abs=1e-5)
        assert context.predictions[name].logit == pytest.approx(predictions.logit, abs=1e-5)
    assert abs(cached.predictions["personalised"].logit).max() > 1e-3, "experts have learned something to compare"
    assert new.num_comparisons == 12


def test_another_base_finds_nothing_of_this_one(
    train: Callable[..., MixtureTrainer], read: list[int], tmp_path: Path
) -> None:
    policy = train().policy
    policy.config = type(policy.config)(**{**vars(policy.config), "base_sha256": "of another base"})
    read.clear()
    evaluate(policy, make_rows(3)[:6], cache=StateCache("disk", tmp_path / "cache"))
    assert sum(read) > 0


def test_memory_leaves_nothing_on_disk(train: Callable[..., MixtureTrainer], tmp_path: Path) -> None:
    policy = train(cache_states="memory").policy
    evaluate(policy, make_rows(), cache=StateCache("memory", tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_experts_that_read_token_ids_do_without(train: Callable[..., MixtureTrainer], tmp_path: Path) -> None:
    policy = train(branch_depth=1, init="random").policy
    cache = StateCache("disk", tmp_path / "elsewhere")
    scored = evaluator.score_table(policy, make_rows(), cache=cache)
    assert len(scored.table) == 12
    assert not (tmp_path / "elsewhere").exists()
