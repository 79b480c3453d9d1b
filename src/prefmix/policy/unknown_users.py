"""Weights for somebody about whom nothing is known, by what they should be good for.

    average, worst_group       from comparisons: good for the average group, or for the worst one (group DRO)
    max_min, min_max_regret    matrix games over types of people: U_jk, what type j gets from expert k

Without comparisons the types are those of the policy's own users, one for each expert: U_jk is the mean log-likelihood,
nats a comparison, that expert k gives the training comparisons of users who lean to expert j,
U_jk = sum_u w_uj L_uk / sum_u w_uj n_u. Legend: B comparisons, U users, J types, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.group_objectives import (
    UnknownUserWeights,
    average_weights,
    max_min_weights,
    min_max_regret_weights,
    worst_group_weights,
)
from prefmix.mixture.posterior import group_log_lik

if TYPE_CHECKING:
    from prefmix.policy.mixture_policy import MixturePolicy

Objective = Literal["average", "worst_group", "max_min", "min_max_regret"]
BY_ROWS: dict[str, Callable[..., UnknownUserWeights]] = {"average": average_weights, "worst_group": worst_group_weights}
GAMES = {"max_min": max_min_weights, "min_max_regret": min_max_regret_weights}


def unknown_user_weights(
    policy: MixturePolicy,
    objective: Objective,
    rows: Sequence[Mapping[str, Any]] | None = None,
    by: Literal["group", "user"] = "user",
) -> UnknownUserWeights:
    """Weights that `generate(weights=...)` takes, and what they promise; see `mixture.group_objectives`.

    Args:
        policy: its experts, and without rows what it knows of its users.
        objective: what the weights should be good for.
        rows: comparisons of the groups that count; needed for `average` and `worst_group`.
        by: whether the rows' users or their `group`s are the groups.

    Raises:
        ValueError: an unknown objective, rows without the column, nothing to decide by, or a log-linear policy, whose
            worth is not the mean of its experts'.
    """
    if policy.config.feedback_model.is_product:
        raise ValueError(
            f"objective={objective!r} of a policy with combine='log_linear': these weights are those of mixtures; "
            "leave them out, somebody unknown then gets the mean blend"
        )
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r}: choose one of {', '.join(get_args(Objective))}")
    if rows is not None:
        return _from_rows(*_grouped(policy, rows, by), objective)
    if objective in BY_ROWS:
        raise ValueError(f"objective={objective!r} without rows: give comparisons of the groups that count")
    return GAMES[objective](user_utility(policy))


def default_weights(
    policy: MixturePolicy,
    objective: Objective | None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    by: Literal["group", "user"] = "user",
) -> dict[str, Any]:
    """What `PolicyConfig.unknown_users` keeps of `unknown_user_weights`; None: nothing, so that the gate decides."""
    if objective is None:
        return {}
    # The types of a game are users as the policy knows them, not as an earlier default would have them.
    before, policy.config = policy.config, replace(policy.config, unknown_users={})
    try:
        found = unknown_user_weights(policy, objective, rows, by)
    finally:
        policy.config = before
    return {"objective": objective, "weights": [float(weight) for weight in found.weights]}


def user_utility(policy: MixturePolicy) -> Float[Tensor, "K K"]:
    """[K, K] U_jk of the policy's users; experts to whom nobody leans are left out of the types.

    Raises:
        ValueError: the policy knows of no user's comparisons.
    """
    users, seen = policy.users, policy.users.count > 0
    if not bool(seen.any()):
        raise ValueError(
            "the policy knows no user's comparisons (rows without users, or user_state was left out); give rows"
        )
    names = [name for name, known in zip(users.names, seen.tolist(), strict=True) if known]
    weights = policy.user_log_weights(names).exp()
    gains, counts = weights.T @ users.log_lik[seen], weights.T @ users.count[seen]
    types = counts > 1e-6 * counts.sum()
    return gains[types] / counts[types].unsqueeze(1)


def _grouped(
    policy: MixturePolicy, rows: Sequence[Mapping[str, Any]], by: Literal["group", "user"]
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B"]]:
    scored = [entry for entry in policy.score(rows) if "probabilities" in entry]
    named = [(entry, rows[entry["row"]].get(by)) for entry in scored]
    kept = [(entry["probabilities"], str(name)) for entry, name in named if name is not None]
    if not kept:
        raise ValueError(f"by={by!r}: no row has a {by}; add that column, or use the other one")
    probabilities, names = zip(*kept, strict=True)
    group = np.unique(names, return_inverse=True)[1]
    return torch.tensor(probabilities, dtype=torch.float64).log(), torch.from_numpy(group)


def _from_rows(log_lik: Float[Tensor, "B K"], group: Int[Tensor, "B"], objective: str) -> UnknownUserWeights:
    num = int(group.max()) + 1
    if objective in BY_ROWS:
        return BY_ROWS[objective](log_lik, group, num)
    mean = group_log_lik(log_lik, group, num) / torch.bincount(group, minlength=num).unsqueeze(1)
    return GAMES[objective](mean)
