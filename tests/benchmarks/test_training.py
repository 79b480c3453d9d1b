"""What the speed table rests on: turns change nothing, counts are right, the script runs through on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def make_run(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> Callable[[str, int], MixtureTrainer]:
    rows = [
        {"prompt": f"What is {i}?", "chosen": f" It is {i} the sky", "rejected": f" the film {i * 7}"} for i in range(8)
    ]

    def make(name: str, num_experts: int) -> MixtureTrainer:
        args = MixtureConfig(
            str(tmp_path / name), num_experts=num_experts, init="random", init_hold_epochs=0, cache_states="off",
            per_device_train_batch_size=2, max_steps=4, logging_steps=1, save_strategy="no", disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        return MixtureTrainer(make_tiny_model(), args, train_dataset=rows, processing_class=tiny_tokenizer)

    return make


def test_trainers_that_take_turns_train_as_they_do_alone(make_run: Callable[[str, int], MixtureTrainer]) -> None:
    from measuring.turns import SteppedTrainer

    stepped = {k: SteppedTrainer(lambda k=k: make_run(f"turns-{k}", k)) for k in (1, 3)}
    costs: dict[int, list[Any]] = {k: [] for k in stepped}
    for _ in range(4):
        for k, trainer in stepped.items():
            costs[k].append(trainer.step())
    for k, trainer in stepped.items():
        alone = make_run(f"alone-{k}", k)
        alone.train()
        expected = [line["loss"] for line in alone.state.log_history if "loss" in line]
        assert [cost.loss for cost in costs[k]] == pytest.approx(expected, rel=1e-6)
        for p, q in zip(alone.mixture.experts.parameters(), trainer.trainer.mixture.experts.parameters(), strict=True):
            assert torch.equal(p, q)
        trainer.close()


def test_a_trainer_that_runs_out_of_rows_says_so(make_run: Callable[[str, int], MixtureTrainer]) -> None:
    from measuring.turns import SteppedTrainer

    stepped = SteppedTrainer(lambda: make_run("short", 1))
    for _ in range(4):
        stepped.step()
    with pytest.raises(RuntimeError, match="too few rows"):
        stepped.step()


def test_intervals_hold_the_median_and_skip_nothing() -> None:
    from measuring.intervals import median_interval, ratio_interval

    assert median_interval([3.0]) == (3.0, 3.0, 3.0)
    found = ratio_interval([2.0, 4.0, 6.0, 8.0, 1000.0], [1.0, 2.0, 3.0, 4.0, 1.0])
    assert found.median == 2.0
    assert found.low == 2.0
    assert found.high == 1000.0


def test_tokens_of_a_step_by_hand() -> None:
    from measuring.texts import step_tokens

    from prefmix.data.comparisons import ComparisonTable, TextTable

    texts = TextTable(
        prompt_ids=[[1, 2, 3], [1, 2, 3], [7, 8]], completion_ids=[[4, 5], [6], [9, 9, 9]],
        prompt_index=np.array([0, 0, 1]), prompts=[[1, 2, 3], [7, 8]],
    )  # fmt: skip
    nothing = np.zeros(2, dtype=np.int64)
    table = ComparisonTable(
        texts, np.array([0, 2]), np.array([1, 1]), nothing, (), np.ones(2, dtype=np.float32), nothing, (), [{}, {}],
        nothing,
    )  # fmt: skip
    found = step_tokens(table, [np.array([0])])
    assert found == (2, 9, 10, 3, 15 + 10, 6, 6 + (2 * 3 + 3) + (3 + 1))
    assert step_tokens(table, [np.array([0]), np.array([0, 1])]).texts == 2.5


def test_operations_of_the_trunk_are_those_that_torch_counts(make_tiny_model: Callable[..., Any]) -> None:
    from measuring.products import trunk_products
    from measuring.texts import StepTokens

    model, texts, length = make_tiny_model(attn_implementation="eager"), 3, 11
    with FlopCounterMode(display=False) as counter:
        model.get_decoder()(torch.randint(320, (texts, length)))
    counted = counter.get_flop_counts()["Global"]
    attention = sum(value for operation, value in counted.items() if "bmm" in str(operation))
    linear = sum(counted.values()) - attention
    pairs = texts * length * (length + 1) / 2
    tokens = StepTokens(texts, texts * length, texts * length, 0, pairs, 0, 0)
    causal = attention * (length + 1) / (2 * length)  # torch counts both halves
    assert trunk_products(model, tokens) == pytest.approx(1e-9 * (linear + causal), rel=1e-9)


def test_operations_of_heads_by_hand(make_tiny_model: Callable[..., Any]) -> None:
    from measuring.products import head_products
    from measuring.texts import StepTokens

    tokens = StepTokens(2, 20, 20, 10, 100, 15, 80)
    found = head_products(make_tiny_model(), tokens, 8, 4, cached=True)
    assert found.trunk == 0
    assert found.base == pytest.approx(2e-9 * 10 * 320 * 32)
    assert found.low_rank == pytest.approx(8 * 2e-9 * 10 * 4 * (3 * 320 + 2 * 32))
    assert found.up == pytest.approx(8 * 4e-9 * 320 * 32 * 4)
    assert found.least_seconds(2.0, 1.0) == pytest.approx(found.base / 2 + found.low_rank + found.up)


@pytest.mark.slow
def test_the_script_runs_through_on_a_tiny_model(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    make_tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "results" / "table.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "training.py"),
        "--model",
        str(tmp_path / "model"),
        "--repetitions",
        "1",
    ]
    command += ["--only", "2", "3", "6", "7", "--rows", "4:1", "--output", str(output)]
    without_data = {name: value for name, value in os.environ.items() if name != "PREFMIX_DATA"}
    done = subprocess.run(command, capture_output=True, text=True, env=without_data, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| 3 | K=8 heads, cached, times ONE TRL LoRA | 4:1 |" in done.stdout
    found = json.loads(output.read_text())
    assert found["gate"]["against float64"]["heads, K=8"]["gradient"] < 1e-5
    assert found["stages"]["4:1"]["contenders"]["heads, K=8"]["configuration"]["num_experts"] == 8
    assert str(tmp_path) not in output.read_text()
