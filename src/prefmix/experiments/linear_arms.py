"""Arms without an expert: linear rewards on pooled trunk states, as a mixture (probe) or weighed by each user.

Legend: B comparisons, P features, U users, K linear rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.users import latent_groups, num_latent_groups
from prefmix.evaluation.scoring import Predictions, RowScores, predict
from prefmix.experiments.arm_predictions import Fitted, NewUsers, Ways
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.mixture.features import Projector, pool_features, project
from prefmix.mixture.linear_em import ProbeData
from prefmix.mixture.low_rank_rewards import LowRankRewards, fit_low_rank_rewards, fit_users, user_margins
from prefmix.mixture.posterior import group_log_lik
from prefmix.mixture.probe import fit_probe

PriorOf = Callable[[ComparisonTable, np.ndarray], Tensor]


class TrainingRows(NamedTuple):
    """Training comparisons as feature differences, and the map that makes more of them.

    Attributes:
        data: the comparisons, by user (rows without one are users of their own).
        features: [N, P] of the training texts.
        projector: applied to other texts.
        num_users: U.
    """

    data: ProbeData
    features: Tensor
    projector: Projector
    num_users: int


def training_rows(table: ComparisonTable, states: TrunkStates, dim: int) -> TrainingRows:
    """Features of the training texts and their differences. Args: dim principal directions."""
    centre_by = torch.from_numpy(table.texts.prompt_index)
    pooled = pool_features(states.completion_mean, dim, _lengths(table), centre_by=centre_by)
    difference = (pooled.features[table.chosen] - pooled.features[table.rejected]).float()
    group = torch.from_numpy(latent_groups(table, "user"))
    weight = torch.from_numpy(table.weight).float()
    data = ProbeData(difference, group, weight, num_latent_groups(table, "user"))
    return TrainingRows(data, pooled.features, pooled.projector, len(table.users))


def fitted_probe(
    table: ComparisonTable, states: TrunkStates, *, num_rewards: int, dim: int, ridge: float | None, seed: int
) -> Fitted:
    """The probe: a mixture of K linear rewards, each user's posterior from their training comparisons."""
    rows = training_rows(table, states, dim)
    fit = fit_probe(
        rows.features,
        torch.from_numpy(table.chosen),
        torch.from_numpy(table.rejected),
        rows.data.group,
        rows.data.num_groups,
        num_rewards,
        weight=rows.data.weight,
        ridge=ridge,
        generator=torch.Generator().manual_seed(seed),
    )
    coefficients, prior = fit.coefficients.double(), fit.log_weights.double()

    def scores(table: ComparisonTable, states: TrunkStates) -> RowScores:
        return _scores(differences(rows, table, states) @ coefficients.T)

    def ways(table: ComparisonTable, states: TrunkStates) -> Ways:
        found, known = scores(table, states), (table.user >= 0) & (table.user < rows.num_users)
        posterior = fit.log_resp.double()[torch.from_numpy(np.where(known, table.user, 0))]
        own = torch.where(torch.from_numpy(known).unsqueeze(1), posterior, prior)
        return Ways(no_reference(table), predict(prior.expand_as(own), found), predict(own, found))

    def of_new_users(new: NewUsers, states: TrunkStates) -> dict[int, Predictions]:
        found, user = scores(new.table, states), torch.from_numpy(new.table.user)
        predictions, weight = {}, torch.from_numpy(new.table.weight).double()
        for size in new.sizes:
            shown = new.shown(size)
            evidence = group_log_lik(found.log_lik[shown], user[shown], len(new.table.users), weight[shown])
            own = torch.log_softmax(prior + evidence[user[new.scored]], dim=-1)
            predictions[size] = predict(own, found.select(new.scored))
        return predictions

    return Fitted(ways, of_new_users, notes={"ridge": fit.ridge})


def fitted_low_rank_reward(
    table: ComparisonTable,
    states: TrunkStates,
    *,
    num_rewards: int,
    dim: int,
    ridge: float,
    user_variance: float,
    seed: int,
) -> Fitted:
    """Users who weigh K linear rewards; new users by their weights alone, the rewards as they are."""
    rows = training_rows(table, states, dim)
    generator = torch.Generator().manual_seed(seed)
    fit = fit_low_rank_rewards(rows.data, num_rewards, ridge=ridge, user_variance=user_variance, generator=generator)

    def ways(table: ComparisonTable, states: TrunkStates) -> Ways:
        difference, known = differences(rows, table, states), (table.user >= 0) & (table.user < rows.num_users)
        own = fit.user_logits[torch.from_numpy(np.where(known, table.user, 0))]
        own = torch.where(torch.from_numpy(known).unsqueeze(1), own, 0.0)
        nobody = torch.zeros_like(own)
        alike, personal = (_from_margins(user_margins(fit.model, difference, logits)) for logits in (nobody, own))
        return Ways(no_reference(table), alike, personal)

    def of_new_users(new: NewUsers, states: TrunkStates) -> dict[int, Predictions]:
        difference = differences(rows, new.table, states)
        return {size: _new_users_of_size(fit.model, new, difference, size) for size in new.sizes}

    return Fitted(ways, of_new_users, notes={"ridge": ridge, "user_variance": user_variance})


def differences(rows: TrainingRows, table: ComparisonTable, states: TrunkStates) -> Tensor:
    """[B, P] f(chosen) - f(rejected) of other comparisons, float64."""
    features = project(rows.projector, states.completion_mean, _lengths(table)).double()
    return features[table.chosen] - features[table.rejected]


def _new_users_of_size(model: LowRankRewards, new: NewUsers, difference: Tensor, size: int) -> Predictions:
    shown, table = torch.from_numpy(new.shown(size)), new.table
    user, weight = torch.from_numpy(table.user), torch.from_numpy(table.weight).double()
    logits = fit_users(model, ProbeData(difference[shown], user[shown], weight[shown], len(table.users)))
    rows = torch.from_numpy(new.scored)
    return _from_margins(user_margins(model, difference[rows], logits[user[rows]]))


def _scores(margins: Tensor) -> RowScores:
    return RowScores(logsigmoid(margins), logsigmoid(-margins), torch.zeros(len(margins), dtype=torch.float64))


def _from_margins(margins: Tensor) -> Predictions:
    return Predictions(logsigmoid(margins).numpy(), margins.numpy())


def no_reference(table: ComparisonTable) -> Predictions:
    """Linear rewards have no reference policy: a coin."""
    return Predictions(np.full(len(table), -np.log(2.0)), np.zeros(len(table)))


def _lengths(table: ComparisonTable) -> Tensor:
    return torch.tensor([len(ids) for ids in table.texts.completion_ids])
