"""Held-out figures of a policy: for the population, for users it knows, for new users, for each true group.

Every figure comes from the experts' implicit rewards; posteriors are recomputed from their likelihoods. `group` is read
to report by group and agreement, and by nothing that predicts. Legend: B comparisons, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.evaluation.baselines import Baselines, baseline_predictions
from prefmix.evaluation.cached_states import StateCache
from prefmix.evaluation.metrics import Agreement, accuracy, agreement, usage
from prefmix.evaluation.new_users import split_context
from prefmix.evaluation.report import EvaluationReport, Figures, figures
from prefmix.evaluation.scoring import (
    Predictions,
    ReadTexts,
    RowScores,
    States,
    predict,
    read_texts,
    score_texts,
)
from prefmix.evaluation.weights import (
    context_log_weights,
    known_user_log_weights,
    personalises,
    population_log_weights,
)
from prefmix.mixture.posterior import posterior
from prefmix.policy.feedback_rows import check_feedback

if TYPE_CHECKING:
    from prefmix.policy.mixture_policy import MixturePolicy

Rows = ComparisonTable | Sequence[Mapping[str, Any]]


class ScoredTable(NamedTuple):
    """Rows, what the experts say of them, and the gate for them as for unknown users.

    Attributes:
        table: B comparisons.
        known_user: [B] the row's user among the policy's users, -1 where the policy does not know them.
        scores: what the experts say.
        gate_log_weights: [B, K] the gate with every user unknown, float64.
        texts: the log-probabilities that the scores are made of.
    """

    table: ComparisonTable
    known_user: np.ndarray
    scores: RowScores
    gate_log_weights: Float[Tensor, "B K"]
    texts: ReadTexts


def evaluate(
    policy: MixturePolicy,
    rows: Rows | ScoredTable,
    *,
    context_rows: Rows | None = None,
    new_user_context: Sequence[int] = (0, 1, 2, 4, 8, 16),
    states: States | None = None,
    cache: StateCache | None = None,
    name: str = "mixture",
    true_groups: bool = False,
    seed: int = 0,
) -> EvaluationReport:
    """Evaluates a policy on held-out comparisons.

    Population: weights from the gate alone. Personalised: the posterior from a user's *training* comparisons, which
    the policy carries. New users: the posterior from n context comparisons; the other comparisons of the same people
    are scored, one set for all n. Context comes from `context_rows` where given, else from `rows` themselves.

    Args:
        policy: the trained policy.
        rows: held-out preference rows, or a table whose first users are the policy's, or such scored before.
        context_rows: other rows of the same people, used as context of new users only.
        new_user_context: the context sizes n; those that fewer than half of the people can give are left out.
        states: cached trunk states of the texts of `rows` (a table).
        cache: where states are found, or kept once read, if none are given; None: every text is read anew.
        name: of the policy in tables.
        true_groups: the oracle: weights are one-hot at the row's true group instead of posteriors.
        seed: of the bootstrap and the choice of context.

    Raises:
        ValueError: no rows, or `true_groups` with rows that name no group.
    """
    scored = rows if isinstance(rows, ScoredTable) else score_table(policy, rows, states=states, cache=cache)
    table, scores, gate, latent = scored.table, scored.scores, policy.model.gate, policy.config.latent
    known = scored.known_user >= 0 if personalises(latent, gate) else np.zeros(len(table), bool)
    log_weights = known_user_log_weights(gate, latent, policy.users, scored.gate_log_weights, scored.known_user)
    if true_groups:
        log_weights, known = _one_hot_groups(table, policy.config.num_experts), np.ones(len(table), bool)
    config = policy.config
    simple = baseline_predictions(scored.texts, scores, table, beta=config.beta, feedback=config.feedback_model)
    predictions = simple | {
        "population": predict(population_log_weights(gate, scored.gate_log_weights), scores),
        "personalised": predict(log_weights, scores),
    }
    everything = np.ones(len(table), bool)
    curve = NewUserCurve({}, False)
    if personalises(latent, gate) and not true_groups:
        context = None if context_rows is None else as_unknown(policy, score_table(policy, context_rows, cache=cache))
        new = as_unknown(policy, scored)
        curve = new_user_curve(policy, new, new if context is None else context, new_user_context, seed)
    return EvaluationReport(
        name=name,
        num_comparisons=len(table),
        num_users=len(np.unique(table.user[table.user >= 0])),
        num_texts=len(np.unique(table.compared)),
        baselines=Baselines(**{name: _figures(found, table, everything, seed) for name, found in simple.items()}),
        population=_figures(predictions["population"], table, everything, seed),
        personalised=_figures(predictions["personalised"], table, known, seed) if known.any() else None,
        num_known_rows=int(known.sum()),
        new_users=curve.by_size,
        new_users_met=curve.met,
        expert_accuracy=_each_alone(scores),
        agreement=_agreement(policy, scored, log_weights),
        usage=_usage(scored, log_weights, known),
        predictions=predictions,
        user=table.user,
    )


def _each_alone(scores: RowScores) -> list[float]:
    return [accuracy(logit) for logit in (scores.win - scores.log_lik_reversed).T.numpy()]


def score_table(
    policy: MixturePolicy, rows: Rows, *, states: States | None = None, cache: StateCache | None = None
) -> ScoredTable:
    """Tokenizes rows where they are not a table yet, and asks experts and gate about them.

    Raises:
        ValueError: no comparison is left.
    """
    config = policy.config
    table = rows if isinstance(rows, ComparisonTable) else policy.table(rows, progress=True)
    if len(table) == 0:
        raise ValueError("rows: no comparison to evaluate; give at least one row that is not a tie")
    index = np.array([policy.users.index(name) for name in table.users], dtype=np.int64)
    known_user = np.where(table.user >= 0, index[table.user], -1) if len(index) else np.full(len(table), -1)
    if states is None and cache is not None:
        states = cache.states(policy, table)
    check_feedback(table, config.feedback_model)
    texts = read_texts(policy.model.experts, table, states=states)
    noise = policy.users.rates(known_user.tolist(), config.label_noise)
    scores = score_texts(texts, table, beta=config.beta, feedback=config.feedback_model, noise=noise)
    return ScoredTable(table, known_user, scores, policy.table_gate_log_weights(table).double().cpu(), texts)


def as_unknown(policy: MixturePolicy, scored: ScoredTable) -> ScoredTable:
    """Rows as of people about whom nothing is known, whose labels have no error rate of their own yet."""
    if policy.users.noise is None:
        return scored
    config = policy.config
    scores = score_texts(scored.texts, scored.table, beta=config.beta, feedback=config.feedback_model)
    return scored._replace(scores=scores)


def _figures(predictions: Predictions, table: ComparisonTable, rows: np.ndarray, seed: int) -> Figures:
    chosen = Predictions(predictions.log_prob[rows], predictions.logit[rows])
    return figures(chosen, table.user[rows], table.group[rows], table.groups, seed)


def _one_hot_groups(table: ComparisonTable, num_experts: int) -> Float[Tensor, "B K"]:
    if (table.group < 0).any() or table.group.max() >= num_experts:
        raise ValueError(
            f"true_groups=True: rows need a group among the first {num_experts} of {list(table.groups)}; "
            "the oracle has one expert for each true group, in their order"
        )
    log_weights = torch.full((len(table), num_experts), -torch.inf, dtype=torch.float64)
    log_weights[torch.arange(len(table)), torch.from_numpy(table.group)] = 0.0
    return log_weights


class NewUserCurve(NamedTuple):
    """Figures by number of context comparisons.

    Attributes:
        by_size: n -> figures of one set of rows.
        met: whether the people also trained the experts (then their training evidence was hidden).
    """

    by_size: dict[int, Figures]
    met: bool


def new_user_curve(
    policy: MixturePolicy, scored: ScoredTable, context: ScoredTable, sizes: Sequence[int], seed: int = 0
) -> NewUserCurve:
    """What a few comparisons of a person tell about that person's other comparisons, without training.

    People that the policy does not know are used where the rows have any; else its own users, their training evidence
    hidden.

    Args:
        policy: the policy.
        scored: rows to score.
        context: rows of the same people to learn from; `scored` itself splits each person's rows in two.
        sizes: context sizes n.
        seed: of the split and the bootstrap.
    """
    table, gate, latent = scored.table, policy.model.gate, policy.config.latent
    unknown = (table.user >= 0) & (scored.known_user < 0)
    met = not unknown.any()
    person = np.where(met | unknown, table.user, -1)
    names = {name: i for i, name in enumerate(table.users)}
    index = np.array([names.get(name, -1) for name in context.table.users], dtype=np.int64)
    context_person = np.where(context.table.user >= 0, index[context.table.user], -1) if len(index) else person[:0]
    context_person = np.where(np.isin(context_person, person), context_person, -1)
    split = split_context(context_person, sizes, seed)
    rows = split.scored if context is scored else np.isin(person, context_person[split.scored]) & (person >= 0)
    by_size = {}
    for n in split.sizes if rows.any() else ():
        shown = (split.rank >= 0) & (split.rank < n)
        log_weights = context_log_weights(
            gate,
            latent,
            scored.gate_log_weights[rows],
            person[rows],
            context.gate_log_weights[shown],
            context.scores.log_lik[shown],
            context_person[shown],
            context.table.weight[shown],
        )
        predictions = predict(log_weights, scored.scores.select(rows))
        by_size[n] = figures(predictions, person[rows], table.group[rows], table.groups, seed)
    return NewUserCurve(by_size, met)


def _agreement(policy: MixturePolicy, scored: ScoredTable, log_weights: Float[Tensor, "B K"]) -> Agreement | None:
    """Users' most probable expert against their true group (a row's, under `pair` without users)."""
    table = scored.table
    if not personalises(policy.config.latent, policy.model.gate):
        log_resp = posterior(scored.gate_log_weights, scored.scores.log_lik).log_resp
        return agreement(table.group, log_resp.numpy())
    first = np.unique(np.where(scored.known_user >= 0, scored.known_user, -1), return_index=True)
    rows = first[1][first[0] >= 0]
    return agreement(table.group[rows], log_weights[torch.from_numpy(rows)].numpy()) if len(rows) else None


def _usage(scored: ScoredTable, log_weights: Float[Tensor, "B K"], known: np.ndarray) -> list[float]:
    """Mean weights over known users (one row each), else mean gate weights over rows."""
    if not known.any():
        return usage(scored.gate_log_weights.exp().numpy()).tolist()
    rows = np.unique(np.where(known, scored.known_user, -1), return_index=True)
    first = rows[1][rows[0] >= 0]
    return usage(log_weights.exp().numpy()[first] if len(first) else log_weights.exp().numpy()).tolist()
