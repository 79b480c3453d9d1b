"""Mixed-logit DPO: one expert under a log-normal beta whose spread is learnt, by the same trainer.

The paper moves policy and distribution by one gradient. Here they alternate, which has the same fixed points: heads by
gradient at a fixed spread (`loss_type="mixed_logit"`), and after each epoch the spread with the largest likelihood of
the training rows at their margins. The mean stays at `beta`, since a scale of all margins is the head's to learn.

Source: Imai et al. 2026 (arXiv 2601.06180). Legend: B training rows.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefmix.evaluation.scoring import score_rows
from prefmix.mixture.likelihoods.mixed_logit import best_spread
from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.training.trainer import MixtureTrainer


class SpreadCallback(TrainerCallback):
    """Moves `beta_spread` after each epoch, and puts back that of the epoch that is kept.

    Attributes:
        spreads: global step -> the spread that the epoch ending there was trained and evaluated with.
    """

    def __init__(self, trainer: MixtureTrainer) -> None:
        self._trainer = trainer
        self.spreads: dict[int, float] = {}

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The M-step of the spread, from the second epoch on: at the start all margins are 0 and say nothing."""
        if state.global_step:
            self._trainer.args.beta_spread = self._best()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remembers what this epoch used."""
        self.spreads[state.global_step] = self._trainer.args.beta_spread

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Heads of the best epoch are back by now."""
        best = state.best_global_step
        if args.load_best_model_at_end and best in self.spreads:
            self._trainer.args.beta_spread = self.spreads[best]

    def _best(self) -> float:
        comparisons, args = self._trainer.train_comparisons, self._trainer.args
        scores = score_rows(
            self._trainer.mixture.experts,
            comparisons.table,
            beta=args.betas,
            feedback=FeedbackModel(),
            states=comparisons.states,
        )
        margins = scores.log_lik - scores.log_lik_reversed
        return best_spread(margins, torch.from_numpy(comparisons.table.weight))
