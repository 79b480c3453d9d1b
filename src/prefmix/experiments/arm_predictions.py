"""What a fitted arm says of comparisons: of people it knows from training, and of new people by what they show.

Legend: B comparisons, C context comparisons, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.comparisons import ComparisonTable
from prefmix.evaluation.evaluator import evaluate, score_table
from prefmix.evaluation.new_users import split_context
from prefmix.evaluation.scoring import Predictions, predict, reference_predictions
from prefmix.evaluation.weights import context_log_weights, personalises, population_log_weights
from prefmix.experiments.per_user import own_expert_log_weights
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.policy.mixture_policy import MixturePolicy

CONTEXT_SIZES = (0, 1, 2, 4, 8, 16)


class NewUsers(NamedTuple):
    """Comparisons of people whom training did not see, the same split for every arm.

    Attributes:
        table: their comparisons.
        sizes: context sizes n that enough people can give.
        rank: [B] place among the person's comparisons; the context of size n is 0 <= rank < n.
        scored: [B] bool, the rows that are scored for every n.
    """

    table: ComparisonTable
    sizes: tuple[int, ...]
    rank: np.ndarray
    scored: np.ndarray

    @classmethod
    def of(cls, table: ComparisonTable, sizes: Sequence[int] = CONTEXT_SIZES, seed: int = 0) -> NewUsers:
        """Splits each person's comparisons into context and scored ones."""
        return cls(table, *split_context(table.user, sizes, seed))

    def shown(self, size: int) -> np.ndarray:
        """[B] bool, the context of size n."""
        return (self.rank >= 0) & (self.rank < size)


class Ways(NamedTuple):
    """Predictions of B comparisons by what is known of the person.

    Attributes:
        reference: the rule that takes the response which the reference finds likelier.
        population: nothing is known.
        personalised: what training taught of a known person; the population's where it taught nothing.
    """

    reference: Predictions
    population: Predictions
    personalised: Predictions


@dataclass(frozen=True)
class Fitted:
    """A fitted arm.

    Attributes:
        predict: comparisons and their states -> predictions.
        predict_new: new people and their states -> context size -> predictions of the scored rows.
        epoch: which epoch was kept; 0 where there are none.
        notes: JSON values worth keeping (a learnt spread, how many users have an expert).
        policy: what was trained, where it is a policy.
    """

    predict: Callable[[ComparisonTable, TrunkStates], Ways]
    predict_new: Callable[[NewUsers, TrunkStates], Mapping[int, Predictions]]
    epoch: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    policy: MixturePolicy | None = None


def fitted_policy(
    policy: MixturePolicy, *, true_groups: bool = False, epoch: int = 0, notes: Mapping[str, Any] | None = None
) -> Fitted:
    """A policy as an arm.

    Args:
        policy: the trained policy.
        true_groups: the oracle: each row by the expert of its true group.
        epoch: which one was kept.
        notes: JSON values worth keeping.
    """

    def ways(table: ComparisonTable, states: TrunkStates) -> Ways:
        scored = score_table(policy, table, states=states)
        found = evaluate(policy, scored, new_user_context=(), true_groups=true_groups).predictions
        return Ways(reference_predictions(scored.scores), found["population"], found["personalised"])

    def of_new_users(new: NewUsers, states: TrunkStates) -> dict[int, Predictions]:
        return new_user_predictions(policy, new, states, true_groups)

    return Fitted(ways, of_new_users, epoch, notes or {}, policy)


def new_user_predictions(
    policy: MixturePolicy, new: NewUsers, states: TrunkStates, true_groups: bool = False
) -> dict[int, Predictions]:
    """Predictions of new people's scored rows after n of their other comparisons; the gate's where users say nothing.

    Args:
        policy: knows none of these people.
        new: their comparisons.
        states: trunk states of the texts.
        true_groups: the row's true group instead, for every n.
    """
    table, rows = new.table, new.scored
    scored, gate, latent = score_table(policy, table, states=states), policy.model.gate, policy.config.latent
    of_rows, gate_rows = scored.scores.select(rows), scored.gate_log_weights[rows]
    if true_groups or not personalises(latent, gate):
        known = own_expert_log_weights(table.group[rows], policy.config.num_experts) if true_groups else None
        alike = predict(population_log_weights(gate, gate_rows) if known is None else known, of_rows)
        return dict.fromkeys(new.sizes, alike)
    found = {}
    for size in new.sizes:
        shown = new.shown(size)
        log_weights = context_log_weights(
            gate,
            latent,
            gate_rows,
            table.user[rows],
            scored.gate_log_weights[shown],
            scored.scores.log_lik[shown],
            table.user[shown],
            table.weight[shown],
        )
        found[size] = predict(log_weights, of_rows)
    return found
