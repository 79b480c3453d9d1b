"""Which weights each comparison is predicted with: the gate, what training taught of a user, or a few context rows.

Legend: B comparisons, U users, K experts.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.gates import Gate
from prefmix.mixture.membership import MembershipRows
from prefmix.mixture.posterior import group_log_lik
from prefmix.policy.personalization import map_user_offsets
from prefmix.policy.user_state import UserState


def personalises(latent: str, gate: Gate) -> bool:
    """Whether a user's comparisons say anything about that user's other comparisons under this model."""
    return latent in ("user", "membership") or "user" in gate.terms


def population_log_weights(gate: Gate, gate_log_weights: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """[B, K] weights for somebody unknown: the gate, and under `membership` its mean over z ~ N(0, I).

    Args:
        gate: the policy's gate.
        gate_log_weights: [B, K] what its terms say of each row.
    """
    if gate.membership is None:
        return gate_log_weights.double()
    return gate.membership.predictive(gate_log_weights, gate.membership.prior(len(gate_log_weights)))


def known_user_log_weights(
    gate: Gate, latent: str, users: UserState, gate_log_weights: Float[Tensor, "B K"], user: np.ndarray
) -> Float[Tensor, "B K"]:
    """Weights of rows whose users the policy knows from training.

    `user`: softmax(gate + evidence of the training comparisons). `pair` with a `user` term: softmax(gate + offsets of
    the user). Rows of unknown users keep the gate.

    Args:
        gate: the policy's gate.
        latent: `user` or `pair`.
        users: what the policy knows.
        gate_log_weights: [B, K] the gate for an unknown user.
        user: [B] index into `users`, -1 where unknown.
    """
    if gate.membership is not None:
        return gate.membership.predictive(gate_log_weights, users.q(user.tolist(), gate.membership.dim))
    known = torch.from_numpy(user >= 0)
    index = torch.from_numpy(np.where(user >= 0, user, 0))
    if len(users) == 0 or not known.any() or not personalises(latent, gate):
        return gate_log_weights.double()
    if latent == "user":
        offsets = users.log_lik[index]
    else:
        in_gate = torch.where(index < len(gate.user), index, -1)
        offsets = gate.user_offsets(in_gate.to(gate.user.device)).detach().double().cpu()
    offsets = torch.where(known.unsqueeze(1), offsets, 0.0)
    return torch.log_softmax(gate_log_weights.double() + offsets, dim=-1)


def context_log_weights(
    gate: Gate,
    latent: str,
    gate_log_weights: Float[Tensor, "B K"],
    user: np.ndarray,
    context_gate_log_weights: Float[Tensor, "C K"],
    context_log_lik: Float[Tensor, "C K"],
    context_user: np.ndarray,
    context_weight: np.ndarray,
) -> Float[Tensor, "B K"]:
    """Weights of rows whose users show C context comparisons and nothing else: no training.

    Closed form under `user`; the MAP weights by EM under `pair` with a `user` term; one pass of the encoder or a small
    fit under `membership`; the gate without context.

    Args:
        gate: the policy's gate.
        latent: `user` or `pair`.
        gate_log_weights: [B, K] the gate of the rows to score, for an unknown user.
        user: [B] any user indices >= 0.
        context_gate_log_weights: [C, K] the gate of the context rows, for an unknown user.
        context_log_lik: [C, K] log p_k of the context rows, nats.
        context_user: [C] indices of the same kind as `user`.
        context_weight: [C] row weights.
    """
    num_users = int(max(user.max(initial=-1), context_user.max(initial=-1))) + 1
    weight = torch.from_numpy(context_weight).double()
    if gate.membership is not None:
        person = torch.from_numpy(context_user)
        shown = MembershipRows(context_gate_log_weights, context_log_lik, person, weight, num_users)
        q = gate.membership.learn(shown)
        return gate.membership.predictive(gate_log_weights, q.select(torch.from_numpy(user)))
    if latent == "user":
        offsets = group_log_lik(context_log_lik, torch.from_numpy(context_user), num_users, weight)
    else:
        population = gate.population_log_weights().detach().double()
        past_counts = gate.user_concentration().detach().double() - 1.0
        offsets = torch.zeros(num_users, gate_log_weights.shape[1], dtype=torch.float64)
        for person in np.unique(context_user):
            rows = torch.from_numpy(np.flatnonzero(context_user == person))
            offsets[person] = map_user_offsets(
                context_gate_log_weights[rows], context_log_lik[rows], weight[rows], population, past_counts
            )
    return torch.log_softmax(gate_log_weights.double() + offsets[torch.from_numpy(user)], dim=-1)
