"""What the checks of a trained policy read, from texts whose log-probabilities are known (`policy.score` reads anew).

Legend: B rows, K experts, N texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from prefmix.data.schema import check_rows
from prefmix.evaluation.cached_states import StateCache
from prefmix.evaluation.evaluator import ScoredTable, score_table
from prefmix.evaluation.weights import known_user_log_weights
from prefmix.experiments.diagnose_experts import ScoredRows
from prefmix.experiments.diagnose_rows import row_columns
from prefmix.experts.interface import ExpertLogProbs
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.preferences import PreferenceScores, preference_scores

Rows = Sequence[Mapping[str, Any]]


def cached_rows(policy: MixturePolicy, rows: Rows, cache: StateCache) -> ScoredRows:
    """As `diagnose.scored_rows`, with the trunk's states from a cache, where the probe finds them too.

    Args:
        policy: the policy.
        rows: preference rows.
        cache: where states are found, or kept once read.
    """
    scored, config = score_table(policy, rows, cache=cache), policy.config
    noise = policy.users.rates(scored.known_user.tolist(), config.label_noise)
    scores = preference_scores(all_texts(scored), scored.table, config, noise)
    place = (policy.model.gate, config.latent, policy.users, scored.gate_log_weights, scored.known_user)
    return rows_of_texts(policy, rows, scored, scores, known_user_log_weights(*place).exp().numpy())


def all_texts(scored: ScoredTable) -> ExpertLogProbs:
    """[N, K] log-probabilities at their place among all texts of the table; nan where no row names one."""
    used, found = scored.texts
    full = [torch.full((len(scored.table.texts), found.log_probs.shape[1]), torch.nan) for _ in range(2)]
    for target, values in zip(full, found, strict=True):
        target[torch.from_numpy(used)] = values
    return ExpertLogProbs(*full)


def rows_of_texts(
    policy: MixturePolicy, rows: Rows, scored: ScoredTable, scores: PreferenceScores, weights: Float[np.ndarray, "B K"]
) -> ScoredRows:
    """As `diagnose.scored_rows`, from texts that have been read."""
    checked = check_rows(rows, keep_ties=policy.config.feedback_model.keeps_ties).rows
    position = {row.source_row: row for row in checked}
    columns = row_columns([position[row] for row in scored.table.source_row.tolist()])
    length = np.log(np.maximum(columns.length, 1))
    return ScoredRows(
        scores.rewards_chosen.double().numpy(),
        scores.rewards_rejected.double().numpy(),
        scores.log_prob.double().exp().numpy(),
        weights,
        columns.user,
        length[columns.chosen] - length[columns.rejected],
    )
