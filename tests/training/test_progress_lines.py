"""People see the figures worth a glance; every file and callback has all of them."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prefmix.training.progress_lines import short_logs
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
SHOWN = ["loss", "rewards/accuracies", "rewards/margins", "mixture/evidence", "usage"]


class Seen(TrainerCallback):
    """What a callback of one's own is shown."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("bar", [False, True])
def test_a_step_is_a_short_line_and_nothing_is_lost(
    make_trainer: Make, rows: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], bar: bool
) -> None:
    seen = Seen()
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": not bar}
    make_trainer(eval_data=rows, callbacks=[seen], **options).train()
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    step, held_out, _ = printed
    assert list(step) == [*SHOWN, "learning_rate", "grad_norm", "epoch"]
    assert len(str(step)) < 300 and sum(map(float, step["usage"].split())) == pytest.approx(1, abs=0.011)
    assert "eval_population_loss" in held_out, "evaluations are shown whole"
    kept = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"logps/chosen", "mixture/rewards/margins_0", "mixture/elbo"} <= kept.keys() & seen.logs[0].keys()


def test_usage_stands_in_the_order_of_experts() -> None:
    logs = {"loss": 1.0} | {f"mixture/usage_{k}": k / 100 for k in (10, 2, 0)}
    assert short_logs(logs)["usage"] == "0.00 0.02 0.10"
    assert short_logs({"train_loss": 1.0, "epoch": 2}) == {"train_loss": 1.0, "epoch": 2}


def test_they_are_taken_out_by_transformers_names(make_trainer: Make) -> None:
    trainer = make_trainer(disable_tqdm=False)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    assert not any(isinstance(each, ProgressCallback | PrinterCallback) for each in trainer.callback_handler.callbacks)
