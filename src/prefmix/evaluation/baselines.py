"""What a policy has to beat before it says anything of people: no opinion, the reference's likelihood, and length.

Legend: B comparisons, N texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from prefmix.data.comparisons import ComparisonTable
from prefmix.evaluation.scoring import Predictions, ReadTexts, RowScores, predict, score_texts
from prefmix.experts.interface import ExpertLogProbs
from prefmix.mixture.likelihoods.model import FeedbackModel

if TYPE_CHECKING:
    from prefmix.evaluation.report import Figures

# Field -> what tables call it.
LABELS = {
    "untrained": "untrained (no opinion)",
    "likelier": "likelier under the reference",
    "longer": "longer response",
}


class Baselines(NamedTuple):
    """Figures of what knows nobody and learned nothing.

    Attributes:
        untrained: a policy before training: every reward is 0, so every pair is a tie (accuracy 1/2, log-loss log 2).
        likelier: a rule, the response that the reference finds likelier: log pi_ref(y_w) > log pi_ref(y_l); a sum over
            tokens, so short responses win. It gives no probabilities.
        longer: a rule, the response with more tokens, the end of the sequence included; it gives no probabilities.
    """

    untrained: Figures
    likelier: Figures
    longer: Figures

    def rows(self) -> Iterator[tuple[str, Figures]]:
        """What tables call each, and its figures."""
        return ((LABELS[name], figure) for name, figure in zip(self._fields, self, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: figure.to_dict() for name, figure in zip(self._fields, self, strict=True)}


def baseline_predictions(
    texts: ReadTexts, scores: RowScores, table: ComparisonTable, *, beta: Sequence[float], feedback: FeedbackModel
) -> dict[str, Predictions]:
    """Field of `Baselines` -> its predictions; the log-probabilities of rules are nan.

    Args:
        texts: the table's texts, as they were read.
        scores: of the table's rows.
        table: B comparisons.
        beta: K values.
        feedback: the observation model: with ties and rankings, no opinion is worth more or less than a coin.
    """
    length = np.array([len(ids) for ids in table.texts.completion_ids], dtype=np.float64)
    zero = torch.zeros_like(texts.log_probs.log_probs)
    silent = score_texts(ReadTexts(texts.used, ExpertLogProbs(zero, zero)), table, beta=beta, feedback=feedback)
    even = torch.full((len(table), zero.shape[1]), 1.0 / zero.shape[1], dtype=torch.float64).log()
    untrained = predict(even, silent)
    return {
        "untrained": Predictions(untrained.log_prob, np.zeros(len(table))),
        "likelier": _rule(scores.ref_logit.double().numpy(), table),
        "longer": _rule(length[table.chosen] - length[table.rejected], table),
    }


def _rule(score: np.ndarray, table: ComparisonTable) -> Predictions:
    """A rule that ranks and gives no probabilities; rows that people judged equal have no right order."""
    score = score if table.tie is None else np.where(table.tie, 0.0, score)
    return Predictions(np.full(len(score), np.nan), score)
