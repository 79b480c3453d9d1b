"""The probe as a baseline that experts must beat: linear rewards on pooled trunk states, no expert trained.

Legend: N texts, U users, K linear rewards, P features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.users import latent_groups, num_latent_groups
from prefmix.evaluation.metrics import Agreement, agreement
from prefmix.evaluation.report import Figures, figures
from prefmix.evaluation.scoring import Predictions, RowScores, predict
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.mixture.features import pool_features, project
from prefmix.mixture.probe import fit_probe, probe_log_lik


class ProbeBaseline(NamedTuple):
    """What the probe alone is worth.

    Attributes:
        figures: personalised figures on the test rows (each user's posterior comes from training rows).
        predictions: of the test rows.
        agreement: of the users' most probable reward with their true group; None without true groups.
        resp: [U, K] posterior of each training user.
    """

    figures: Figures
    predictions: Predictions
    agreement: Agreement | None
    resp: np.ndarray


def probe_baseline(
    train: ComparisonTable,
    train_states: TrunkStates,
    test: ComparisonTable,
    test_states: TrunkStates,
    *,
    num_experts: int,
    dim: int = 64,
    restarts: int = 8,
    seed: int = 0,
) -> ProbeBaseline:
    """Fits the probe to training rows and predicts test rows of the same users.

    Args:
        train: training comparisons.
        train_states: trunk states of their texts.
        test: test comparisons; users with the indices of `train`.
        test_states: trunk states of the test texts.
        num_experts: K.
        dim: principal directions.
        restarts: random starts.
        seed: of the starts.
    """
    pooled = pool_features(
        train_states.completion_mean, dim, _lengths(train), centre_by=torch.from_numpy(train.texts.prompt_index)
    )
    fit = fit_probe(
        pooled.features,
        torch.from_numpy(train.chosen),
        torch.from_numpy(train.rejected),
        torch.from_numpy(latent_groups(train, "user")),
        num_latent_groups(train, "user"),
        num_experts,
        weight=torch.from_numpy(train.weight),
        restarts=restarts,
        generator=torch.Generator().manual_seed(seed),
    )
    features = project(pooled.projector, test_states.completion_mean, _lengths(test)).double()
    chosen, rejected = torch.from_numpy(test.chosen), torch.from_numpy(test.rejected)
    forward = probe_log_lik(features, chosen, rejected, fit.coefficients.double())
    backward = probe_log_lik(features, rejected, chosen, fit.coefficients.double())
    known = (test.user >= 0) & (test.user < len(train.users))
    user = torch.from_numpy(np.where(known, test.user, 0))
    log_weights = torch.where(torch.from_numpy(known).unsqueeze(1), fit.log_resp[user], fit.log_weights).double()
    predictions = predict(log_weights, RowScores(forward, backward, torch.zeros(len(test), dtype=torch.float64)))
    resp = fit.log_resp[: len(train.users)].exp().numpy()
    return ProbeBaseline(
        figures(predictions, test.user, test.group, test.groups, seed),
        predictions,
        agreement(user_groups(train), fit.log_resp[: len(train.users)].numpy()),
        resp,
    )


def user_groups(table: ComparisonTable) -> np.ndarray:
    """[U] the true group of each user, -1 where rows name none."""
    groups = np.full(len(table.users), -1)
    known = table.user >= 0
    groups[table.user[known]] = table.group[known]
    return groups


def _lengths(table: ComparisonTable) -> torch.Tensor:
    return torch.tensor([len(ids) for ids in table.texts.completion_ids])
