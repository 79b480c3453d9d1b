"""The continuous latent of VPL over linear rewards: each user's Gaussian z weighs K rewards, and margins are summed.

    p_i = sigmoid(sum_k w_uk c_k . d_i),   w_u = softmax(a + A z_u),   z_u ~ N(0, I),   q(z_u) Gaussian

VPL reads q off a user's comparisons by an encoder; here q is fitted to them, which bounds the evidence tighter. It is
`low_rank_reward` with a posterior in place of a point. Legend: B comparisons, K rewards, d latent dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.evaluation.scoring import Predictions
from prefmix.experiments.arm_predictions import Fitted, NewUsers, Ways
from prefmix.experiments.linear_arms import differences, no_reference, training_rows
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.mixture.linear_em import ProbeData
from prefmix.mixture.membership import (
    GaussianQ,
    log_linear_rows,
    membership_log_weights,
    sample_z,
    standard_draws,
)
from prefmix.mixture.membership_em import LinearMembership, fit_membership, linear_rows
from prefmix.mixture.membership_fit import fit_users

SAMPLES = 64


def fitted_latent(
    table: ComparisonTable, states: TrunkStates, *, num_rewards: int, dim: int, ridge: float, seed: int
) -> Fitted:
    """Fits rewards, loading and every user's q; new users get theirs from what they show, the rest as it is."""
    rows = training_rows(table, states, dim)
    generator = torch.Generator().manual_seed(seed)
    fit = fit_membership(
        rows.data, num_rewards, max(num_rewards - 1, 1), combine="log_linear", ridge=ridge, generator=generator
    )
    coefficients, gate, loading = (part.double() for part in fit.model[:3])
    model = LinearMembership(coefficients, gate, loading, fit.model.combine)
    q = GaussianQ(*(part.double() for part in fit.q))

    def ways(table: ComparisonTable, states: TrunkStates) -> Ways:
        difference = differences(rows, table, states)
        known = torch.from_numpy((table.user >= 0) & (table.user < rows.num_users)).unsqueeze(1)
        user = torch.from_numpy(np.where(known.squeeze(1).numpy(), table.user, 0))
        own = GaussianQ(*(torch.where(known, part, 0.0) for part in q.select(user)))
        nobody = GaussianQ(*(torch.zeros_like(part) for part in own))
        alike, personal = (predictive(model, difference, of) for of in (nobody, own))
        return Ways(no_reference(table), alike, personal)

    def of_new_users(new: NewUsers, states: TrunkStates) -> dict[int, Predictions]:
        difference = differences(rows, new.table, states)
        return {size: _of_size(model, new, difference, size) for size in new.sizes}

    return Fitted(ways, of_new_users, notes={"ridge": ridge})


def predictive(model: LinearMembership, difference: Tensor, q: GaussianQ) -> Predictions:
    """[B] log of E_q p: the probability is averaged over what is not known of the user, not the margin.

    Args:
        model: of a fit.
        difference: [B, P] f(chosen) - f(rejected).
        q: of the user of each row.
    """
    margins = difference @ model.coefficients.T
    noise = standard_draws(SAMPLES, model.loading.shape[1])
    gate = model.gate_log_weights.expand(len(margins), -1)
    log_weights = membership_log_weights(gate, model.loading, sample_z(q, noise.unsqueeze(1)))
    sides = [
        torch.logsumexp(log_linear_rows(log_weights, side), dim=0) - np.log(len(noise)) for side in (margins, -margins)
    ]
    return Predictions(sides[0].numpy(), (sides[0] - sides[1]).numpy())


def _of_size(model: LinearMembership, new: NewUsers, difference: Tensor, size: int) -> Predictions:
    shown, table = torch.from_numpy(new.shown(size)), new.table
    user, weight = torch.from_numpy(table.user), torch.from_numpy(table.weight).double()
    prior = torch.zeros(len(table.users), model.loading.shape[1], dtype=torch.float64)
    q = GaussianQ(prior, prior.clone())
    if bool(shown.any()):
        data = ProbeData(difference[shown], user[shown], weight[shown], len(table.users))
        noise = standard_draws(16, model.loading.shape[1])
        q = fit_users(linear_rows(model, data), model.loading, "log_linear", noise, steps=30).q
    rows = torch.from_numpy(new.scored)
    return predictive(model, difference[rows], q.select(user[rows]))
