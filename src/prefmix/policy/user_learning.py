"""What comparisons tell of one user: the error rate, where training learnt one for each annotator, then the weights.

Legend: n comparisons of one user, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.mixture.annotator_noise import BetaPrior
from prefmix.mixture.user_noise import MAX_STEPS, JudgedRows, fit_user_noise, prior_with_past
from prefmix.policy.config import PolicyConfig
from prefmix.policy.preferences import PreferenceScores
from prefmix.policy.user_weights import UserWeights

# Each step fits q(z) anew; rates are then right to about a hundredth.
MEMBERSHIP_STEPS, MEMBERSHIP_TOLERANCE = 50, 1e-4


def learn_user(
    weights: UserWeights, user: str, table: ComparisonTable, scores: PreferenceScores, config: PolicyConfig
) -> None:
    """Adds a user's comparisons to what is known of them.

    Args:
        weights: the policy's weights, whose users change.
        user: new or known name.
        table: n comparisons of theirs.
        scores: of these rows.
        config: of the policy.
    """
    prompts = [table.texts.prompts[i] for i in table.prompt]
    log_lik = learn_noise(weights, user, prompts, table, scores, config)
    weights.learn(user, prompts, table.metadata, log_lik, torch.from_numpy(table.weight))


@torch.no_grad()
def learn_noise(
    weights: UserWeights,
    user: str,
    prompts: Sequence[Sequence[int]],
    table: ComparisonTable,
    scores: PreferenceScores,
    config: PolicyConfig,
) -> Float[Tensor, "n K"]:
    """Fits the user's error rate under the prior of training and keeps it; [n, K] log p_k of their rows at that rate.

    Of policies without a prior (rates not learnt by annotator, or saved before it was kept) these are the scores' own.

    Args:
        weights: the policy's weights; `UserWeights.learn` has not had these rows yet.
        user: new or known name.
        prompts: n token sequences, the comparisons' prompts.
        table: n comparisons.
        scores: of these rows.
        config: the prior, and the mean rate, where EM starts for somebody new.
    """
    if config.label_noise_update != "per_annotator" or config.label_noise_prior is None or not len(table):
        return scores.log_lik
    users, prior = weights.users, BetaPrior(*config.label_noise_prior)
    row = users.add(user)
    if users.noise is None:
        users.noise = users.count.new_full((len(users),), torch.nan)
    label = None if table.label is None else torch.from_numpy(table.label).double()
    rows = JudgedRows(scores.margins.double(), torch.from_numpy(table.weight).double(), label)
    known, first = not bool(users.noise[row].isnan()), config.label_noise
    if known:
        first = float(users.noise[row])
        prior = prior_with_past(prior, first, float(users.count[row]))
    slow = weights.latent == "membership"
    rate = fit_user_noise(
        rows,
        prior,
        first,
        weights.responsibilities(row, prompts, table.metadata, rows.weight),
        max_steps=MEMBERSHIP_STEPS if slow else MAX_STEPS,
        **({"tolerance": MEMBERSHIP_TOLERANCE} if slow else {}),
    )
    users.noise[row] = rate
    return rows.log_lik(rate)
