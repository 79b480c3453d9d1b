"""What a run says of itself is what happened, and does not change what the policy is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefmix.training.record import peak_memory

Make = Callable[..., Any]


def test_a_run_records_cost_rows_and_the_held_out_figures_of_its_last_step(
    make_trainer: Make, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    trainer = make_trainer(output_dir=tmp_path / "a", eval_data=rows, eval_strategy="epoch")
    trainer.data_source = "owner/people"
    trainer.train()
    record = json.loads((tmp_path / "a" / "policy" / "training.json").read_text())
    last = [line for line in trainer.state.log_history if "eval_loss" in line][-1]
    assert record["held_out"]["accuracy"] == last["eval_accuracy"] and record["held_out"]["loss"] == last["eval_loss"]
    assert record["cpu_seconds"] > 0 and record["seconds"] > 0 and record["first_step"] == 0
    trained = sum(p.numel() for p in trainer.mixture.parameters() if p.requires_grad)
    assert record["trained_parameters"] == trained > 0
    card = (tmp_path / "a" / "policy" / "README.md").read_text()
    table = trainer.train_comparisons.table
    assert f"`owner/people`: {len(table):,} rows, {len(table.users):,} users, {len(table.texts):,} texts" in card


def test_the_card_names_rows_that_have_a_name(make_trainer: Make, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = make_trainer(output_dir=tmp_path / "a", data=str(tmp_path / "people.jsonl"))
    assert named.policy.record["data"] == str(tmp_path / "people.jsonl")
    assert "data" not in make_trainer(output_dir=tmp_path / "b").policy.record


def test_the_same_command_twice_gives_the_same_policy_by_hash(make_trainer: Make, tmp_path: Path) -> None:
    manifests = []
    for _ in range(2):  # into one folder: the base's path is part of the policy
        make_trainer(output_dir=tmp_path / "a", num_train_epochs=1, overwrite_output_dir=True).train()
        manifests.append((tmp_path / "a" / "policy" / "manifest.json").read_text())
    assert manifests[0] == manifests[1]


def test_peak_memory_is_at_least_what_is_held_now() -> None:
    before = peak_memory()
    held = bytearray(64 * 2**20)
    for i in range(0, len(held), 4096):
        held[i] = 1
    after = peak_memory()
    assert before is None or (after is not None and after >= before and after >= len(held))
