"""Users who weigh a few shared linear rewards: one reward for each user, of low rank over all of them.

    p_i = sigmoid(sum_k w_uk c_k . d_i),   w_u = softmax(a + b_u),   d_i = f(chosen) - f(rejected)

    maximise  sum_i a_i log p_i - ridge/2 sum_k |c_k|^2 - 1/(2 s^2) sum_u |b_u|^2      over c, a and all b_u

Legend: B comparisons, P features, G users, K basis rewards.

Source: LoRe (arXiv 2504.14439) and PAL (2406.08469): basis rewards shared, weights on the simplex for each user, new
users by their weights alone. Here the basis is linear on given features and everything is a maximum a posteriori.
Relations: `membership_em` with `log_linear` is the same model with a posterior over b_u instead of its mode.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.mixture.lbfgs import maximise
from prefmix.mixture.linear_em import ProbeData, fit_linear_em

TOLERANCE = 1e-10  # of L-BFGS: optima to 1e-6 nats a row, where references agree


class LowRankRewards(NamedTuple):
    """What all users share.

    Attributes:
        coefficients: [K, P] c_k.
        logits: [K] a, of somebody unknown.
        user_variance: s^2, of a user's logits b_u.
    """

    coefficients: Float[Tensor, "K P"]
    logits: Float[Tensor, "K"]
    user_variance: float


class LowRankFit(NamedTuple):
    """A fit, float64.

    Attributes:
        model: shared by all users.
        user_logits: [G, K] b_u of the users in the data; 0 for users without rows.
        objective: the penalised log-likelihood, nats.
    """

    model: LowRankRewards
    user_logits: Float[Tensor, "G K"]
    objective: float


def fit_low_rank_rewards(
    data: ProbeData,
    num_rewards: int,
    *,
    ridge: float = 1.0,
    user_variance: float = 4.0,
    restarts: int = 4,
    max_steps: int = 300,
    generator: torch.Generator | None = None,
) -> LowRankFit:
    """Fits basis rewards and all users' weights together, from the best discrete mixture of linear rewards.

    Args:
        data: comparisons; `group` is the user.
        num_rewards: K.
        ridge: precision of the coefficients' prior.
        user_variance: s^2.
        restarts: starts of the discrete fit.
        max_steps: of L-BFGS.
        generator: of those starts; None seeds one with 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    start = fit_linear_em(data, num_rewards, torch.full((restarts,), ridge), anneal=4.0, generator=generator)
    best = int(start.penalised.argmax())
    rows = ProbeData(data.difference.double(), data.group, data.weight.double(), data.num_groups)
    found = [
        start.coefficients[best].double().clone().requires_grad_(),
        start.log_weights[best].double().clone().requires_grad_(),
        # Where the discrete fit put each user, within what the prior allows: at zero all gradients would be alike.
        (start.log_resp[best] - start.log_weights[best]).double().clamp(-1.0, 1.0).requires_grad_(),
    ]

    def objective() -> Tensor:
        model = LowRankRewards(found[0], found[1], user_variance)
        return penalised_log_lik(rows, model, found[2], ridge)

    scale = float(rows.weight.sum())
    maximise(objective, found, max_steps=max_steps, scale=scale, tolerance_change=TOLERANCE)
    value = float(objective().detach())
    coefficients, logits, users = (part.detach() for part in found)
    return LowRankFit(LowRankRewards(coefficients, logits, user_variance), users, value)


def fit_users(model: LowRankRewards, data: ProbeData, max_steps: int = 100) -> Float[Tensor, "G K"]:
    """[G, K] b_u of other users from their comparisons, the shared part as it is; 0 without comparisons."""
    rows = ProbeData(data.difference.double(), data.group, data.weight.double(), data.num_groups)
    users = torch.zeros(data.num_groups, len(model.logits), dtype=torch.float64, requires_grad=True)
    if len(rows.group):
        maximise(
            lambda: penalised_log_lik(rows, model, users, 0.0),
            [users],
            max_steps=max_steps,
            scale=1.0,
            tolerance_change=TOLERANCE,
        )
    return users.detach()


def penalised_log_lik(
    data: ProbeData, model: LowRankRewards, user_logits: Float[Tensor, "G K"], ridge: float
) -> Float[Tensor, ""]:
    """The objective at the top of this module, constants left out; nats."""
    log_lik = logsigmoid(user_margins(model, data.difference, user_logits[data.group]))
    penalty = ridge * model.coefficients.square().sum() + user_logits.square().sum() / model.user_variance
    return (data.weight * log_lik).sum() - 0.5 * penalty


def user_margins(
    model: LowRankRewards, difference: Float[Tensor, "B P"], user_logits: Float[Tensor, "B K"]
) -> Float[Tensor, "B"]:
    """[B] sum_k w_uk c_k . d_i, nats.

    Args:
        model: the shared part.
        difference: [B, P] f(chosen) - f(rejected).
        user_logits: [B, K] b_u of the user of each row; 0 for somebody unknown.
    """
    weights = torch.softmax(model.logits + user_logits, dim=-1)
    return (weights * (difference.double() @ model.coefficients.T)).sum(dim=-1)
