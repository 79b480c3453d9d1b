"""The lines of the log that people read: the figures worth a glance, where transformers prints all of them.

`metrics.jsonl`, `report_to`, `log_history` and callbacks of others get every figure as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "mixture/evidence")
_AFTER_USAGE = ("learning_rate", "grad_norm", "epoch")
_USAGE = "mixture/usage_"


def short_logs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown of a training step's figures; other entries (evaluations, the summary at the end) as they are."""
    if "loss" not in logs or not any(name.startswith(_USAGE) for name in logs):
        return dict(logs)
    usage = {int(name.removeprefix(_USAGE)): value for name, value in logs.items() if name.startswith(_USAGE)}
    shown = {name: logs[name] for name in _SHOWN if name in logs}
    shown["usage"] = " ".join(f"{usage[expert]:.2f}" for expert in sorted(usage))
    return shown | {name: logs[name] for name in _AFTER_USAGE if name in logs}


class _ShortLines(TrainerCallback):
    """Before a callback that shows figures: hands it the short line's."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Shows the short line."""
        super().on_log(args, state, control, logs=short_logs(logs or {}))


class ShortProgress(_ShortLines, ProgressCallback):
    """transformers' bar, with short lines."""


class ShortPrinter(_ShortLines, PrinterCallback):
    """transformers' lines without a bar (`disable_tqdm`), short."""


def shorten_lines(handler: CallbackHandler) -> None:
    """Puts these in the place of transformers' own; a notebook's table, and callbacks of others, stay."""
    short = {ProgressCallback: ShortProgress, PrinterCallback: ShortPrinter}
    handler.callbacks = [short[type(each)]() if type(each) in short else each for each in handler.callbacks]
