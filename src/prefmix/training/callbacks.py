"""What happens between steps: the gate's M-step, the guard, warnings about the mixture, the local log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefmix.policy.folder import LOG_FILE
from prefmix.training.checkpoint import write_atomically
from prefmix.training.diagnostics import warn_of_collapse, warn_of_overconfidence, warn_of_overfitting
from prefmix.training.record import Clock

if TYPE_CHECKING:
    from prefmix.training.trainer import MixtureTrainer


class EMCallback(TrainerCallback):
    """Moves a closed-form gate and looks for NaN after each optimizer step, before anything of it can be saved."""

    def __init__(self, trainer: MixtureTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Continues the sums of a resumed run, and starts the clock."""
        self._trainer.restore_loop()
        self._trainer.clock = Clock.now(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Frozen experts are put back, M-steps in closed form follow, the adversary's step, the guard."""
        self._trainer.frozen.restore()
        self._trainer.m_step_of_gate()
        if (noise := self._trainer.em.noise) is not None:
            noise.m_step()
        if (adversary := self._trainer.em.adversary) is not None:
            adversary.step(self._trainer.readers)
        self._trainer.guard.check(state.global_step + 1, self._trainer.mixture)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Warns of experts that die or repeat each other."""
        warn_of_collapse(self._trainer)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Says what would help where experts learnt by heart, or users' posteriors are too sure."""
        warn_of_overfitting(self._trainer)
        warn_of_overconfidence(self._trainer)


class MetricsFileCallback(TrainerCallback):
    """Keeps `metrics.jsonl` in the run's folder, one line for each line that training logs.

    Evaluations of a trained model are not part of the run: a finished run's file never changes.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / LOG_FILE
        self._training = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the file, or cuts it back to what the checkpoint knows: later lines will be written again."""
        self._training = True
        if state.is_world_process_zero:
            text = "".join(json.dumps(line) + "\n" for line in state.log_history)
            write_atomically(self._file, lambda path: path.write_text(text, encoding="utf-8"))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Adds the line that the trainer keeps; other callbacks take fields out of what they are shown."""
        if state.is_world_process_zero and self._training:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(state.log_history[-1]) + "\n")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Closes the file."""
        self._training = False
