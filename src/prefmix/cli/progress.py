"""Training as a person follows it: one bar and short lines on stderr; every figure is in `metrics.jsonl`."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prefmix.data.stages import bar_size

# Log name -> what the line calls it.
_TRAINING = {"loss": "loss", "rewards/accuracies": "accuracy", "mixture/responsibility_entropy": "entropy"}
_HELD_OUT = {"accuracy": "accuracy", "population_accuracy": "population", "loss": "loss"}


class ShortProgress(TrainerCallback):
    """A bar over optimizer steps, and a short line for every entry of the log."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the bar where the run starts."""
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr, **bar_size()
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Prints what is worth a glance, until training ends: the last evaluation stands in the summary."""
        line = short_line(logs or {})
        if self._bar is not None and line:
            tqdm.write(f"step {state.global_step:>5}/{state.max_steps}  {line}", file=sys.stderr)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def follow(trainer: Any) -> None:
    """Gives a trainer this progress instead of transformers' lines of every figure."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ShortProgress())


def short_line(logs: dict[str, float]) -> str:
    """The line of one log entry; empty where nothing of it is worth a glance."""
    if "loss" in logs:
        usage = [f"{value:.2f}" for name, value in sorted(logs.items()) if name.startswith("mixture/usage_")]
        return _figures(logs, _TRAINING, "") + (f"  usage {' '.join(usage)}" if usage else "")
    if "eval_loss" in logs:
        return "held out  " + _figures(logs, _HELD_OUT, "eval_")
    return ""


def _figures(logs: dict[str, float], names: dict[str, str], prefix: str) -> str:
    found = [f"{short} {float(logs[prefix + name]):.3f}" for name, short in names.items() if prefix + name in logs]
    return "  ".join(found)
