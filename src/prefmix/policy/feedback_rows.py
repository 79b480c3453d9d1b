"""The rows of a table as the likelihoods read them, over the texts that were scored. Legend: N texts, B rows."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.mixture.likelihoods.feedback import FeedbackRows
from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.mixture.likelihoods.plackett_luce import Rankings


def table_rows(
    table: ComparisonTable, used: np.ndarray | None = None, noise: Float[Tensor, "B"] | None = None
) -> FeedbackRows:
    """All rows of a table.

    Args:
        table: B comparisons.
        used: [N] ascending, the texts that were scored (all that rows name); None: all texts of the table.
        noise: [B] learnt rates of whoever judged; None: the model's.
    """
    texts = np.arange(len(table.texts)) if used is None else used

    def local(index: np.ndarray) -> Tensor:
        return torch.from_numpy(np.searchsorted(texts, index))

    ranked = table.ranked
    return FeedbackRows(
        local(table.chosen),
        local(table.rejected),
        torch.tensor([len(table.texts.completion_ids[i]) for i in texts.tolist()]),
        None if table.tie is None else torch.from_numpy(table.tie),
        None if table.label is None else torch.from_numpy(table.label),
        None
        if ranked is None
        else Rankings(local(ranked.texts), torch.from_numpy(ranked.size), torch.from_numpy(ranked.stages)),
        noise,
    )


def check_feedback(table: ComparisonTable, model: FeedbackModel) -> None:
    """Refuses rows that the observation model has no likelihood for.

    Raises:
        ValueError: ties, rankings or soft labels where nothing reads them, with the remedy.
    """
    if table.tie is not None and not model.keeps_ties:
        raise ValueError(
            "the table holds ties and ties='drop': name a model of ties (ties='davidson' or 'rao_kupper'), or read the "
            "rows with keep_ties=False"
        )
    if table.ranked is not None and not (
        model.loss_type in ("sigmoid", "sigmoid_norm") and model.label_noise == model.label_smoothing == 0
    ):
        raise ValueError(
            f"rows with rankings and loss_type={model.loss_type!r}, label_noise={model.label_noise:g}, "
            f"label_smoothing={model.label_smoothing:g}: Plackett-Luce is the likelihood of orders, without flipped "
            "labels; use loss_type='sigmoid' (or sigmoid_norm) and leave the other two at 0"
        )
    if model.likelihood != "mbt" and (table.ranked is not None or table.label is not None):
        raise ValueError(
            f"rows with rankings or soft labels and likelihood={model.likelihood!r}: it reads pairs; use "
            f"{'combine=' + repr('mixture') if model.is_product else repr('mbt')}"
        )
