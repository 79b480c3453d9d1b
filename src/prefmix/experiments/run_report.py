"""`report_run`: from a trained run and held-out rows to what its page shows; every text is read once.

Legend: B rows, P prompts, U users, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefmix.evaluation.cached_states import StateCache
from prefmix.evaluation.evaluator import ScoredTable, evaluate, score_table
from prefmix.evaluation.figures.experts import ExpertRows
from prefmix.evaluation.intervals import paired_difference
from prefmix.evaluation.metrics import hits
from prefmix.evaluation.report import EvaluationReport
from prefmix.evaluation.scoring import Predictions
from prefmix.evaluation.weights import known_user_log_weights, personalises
from prefmix.experiments.diagnose import diagnose_policy, learnt_noise
from prefmix.experiments.read_rows import all_texts, rows_of_texts
from prefmix.experiments.report_examples import find_disputes, write_examples
from prefmix.experiments.report_gate import gate_views
from prefmix.experiments.run_data import Gain, People, RunData, cost_of, facts_of, read_log
from prefmix.experiments.verdicts import verdicts
from prefmix.policy.folder import run_folder
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.preferences import PreferenceScores, preference_scores
from prefmix.policy.user_weights import UserWeights

Rows = Sequence[Mapping[str, Any]]
NO_DATA = "no held-out rows were given; give some with --data"


class ReportOptions(NamedTuple):
    """What goes into a report.

    Attributes:
        examples: prompts to write answers to; 0: nothing is generated.
        max_new_tokens: of an answer.
        samples: responses of each expert to each of these prompts that its distance from the reference is taken from.
        names: whether users' names are written.
        probe: whether restarts of the probe are compared (heads with cached states only).
        seed: of samples, bootstrap and restarts.
        progress: whether bars are drawn on stderr.
    """

    examples: int = 4
    max_new_tokens: int = 48
    samples: int = 4
    names: bool = True
    probe: bool = True
    seed: int = 0
    progress: bool = False


def report_run(
    policy: MixturePolicy,
    run: str | Path,
    rows: Rows | None = None,
    *,
    against: Mapping[str, Callable[[], MixturePolicy]] | None = None,
    cache: StateCache | None = None,
    source: str = "",
    options: ReportOptions | None = None,
) -> RunData:
    """Gathers what the page of a run shows.

    Args:
        policy: the run's policy.
        run: the run's folder, where `metrics.jsonl` is; a policy folder has none.
        rows: held-out rows; None: what needs them is left out and says so.
        against: name -> how to load another policy that is evaluated on the same rows, such as single DPO.
        cache: where trunk states are found and kept; None: every text is read anew.
        source: what the rows are called.
        options: what goes in; None: the defaults.

    Raises:
        ValueError: no comparison is left in `rows`.
    """
    options = ReportOptions() if options is None else options
    folder, absent = run_folder(Path(run)), {}
    log = read_log(folder)
    if not log:
        absent["training"] = f"there is no metrics.jsonl in {folder.name}; give the folder that training wrote"
    parts: dict[str, Any] = {"log": log, "cost": cost_of(policy, folder)}
    scored = None if rows is None else score_table(policy, rows, cache=cache)
    parts["people"] = _people(policy, scored, options.names, absent)
    if scored is None or rows is None:
        absent |= dict.fromkeys(("quality", "gate", "experts", "examples", "diagnosis"), NO_DATA)
    else:
        parts |= _on_rows(policy, rows, scored, parts["people"], cache, options, absent)
        parts |= _compared(parts["evaluation"], rows, against or {}, cache, options, absent)
    num = policy.config.num_experts
    return RunData(folder.name, facts_of(policy), num, absent=absent, source=source, **parts)


def _on_rows(
    policy: MixturePolicy,
    rows: Rows,
    scored: ScoredTable,
    people: People | None,
    cache: StateCache | None,
    options: ReportOptions,
    absent: dict[str, str],
) -> dict[str, Any]:
    """Everything that held-out rows tell."""
    config, table = policy.config, scored.table
    evaluation = evaluate(policy, scored, name="this run", cache=cache, seed=options.seed)
    gate, latent = policy.model.gate, config.latent
    log_weights = known_user_log_weights(gate, latent, policy.users, scored.gate_log_weights, scored.known_user)
    weights = log_weights.exp().numpy()
    scores = preference_scores(all_texts(scored), table, config)
    experts = _expert_rows(scored, scores, weights)
    parts: dict[str, Any] = {"evaluation": evaluation, "experts": experts}
    parts["verdicts"] = verdicts(evaluation, learnt_noise(policy), options.seed)
    probed = cache if options.probe else None
    known = rows_of_texts(policy, rows, scored, scores, weights)
    parts["diagnosis"] = diagnose_policy(
        policy, rows, "the run", cache=probed, seed=options.seed, scored=known, writes=options.examples > 0
    )
    parts["gate"] = gate_views(policy, scored, weights)
    if config.num_experts == 1:
        absent["gate"] = "one expert: there is nothing to choose"
    elif not parts["gate"]:
        terms = " + ".join(gate.terms)
        absent["gate"] = f"the gate reads {terms}, and rows bring neither prompts that it reads nor metadata"
    parts["disputes"] = find_disputes(policy, rows, table, scores, weights, options.names)
    if not options.examples:
        absent["answers"] = "no answers were generated (--examples 0)"
        return parts
    written = write_examples(policy, rows, None if people is None else people.weights, options)
    if written is None:
        absent["answers"] = "prompts are token ids or empty, so no answers were generated"
        return parts
    return parts | {"examples": written.examples, "divergence": written.divergence}


def _expert_rows(scored: ScoredTable, scores: PreferenceScores, weights: np.ndarray) -> ExpertRows:
    table, log_probs = scored.table, all_texts(scored)
    tokens = np.array([len(ids) for ids in table.texts.completion_ids], dtype=np.float64)
    shift = (log_probs.log_probs.double() - log_probs.ref_log_probs.double()).numpy() / tokens[:, None]
    length = np.log(tokens[table.chosen]) - np.log(tokens[table.rejected])
    rewards = scores.rewards_chosen.double().numpy(), scores.rewards_rejected.double().numpy()
    return ExpertRows(*rewards, shift[table.chosen], shift[table.rejected], weights, length, table.user)


def _people(policy: MixturePolicy, scored: ScoredTable | None, names: bool, absent: dict[str, str]) -> People | None:
    """The users that the policy knows, with weights for an average prompt."""
    users, config = policy.users, policy.config
    if config.num_experts == 1:
        absent["people"] = "one expert: everybody is with it"
        return None
    if not personalises(config.latent, policy.model.gate):
        absent["people"] = "experts belong to comparisons here (latent: pair), not to users"
        return None
    if not len(users):
        absent["people"] = "the policy knows no users: rows named none, or user state was left out"
        return None
    metadata: list[Mapping[str, Any] | None] = [None] * len(users)
    groups: list[str | None] = [None] * len(users)
    if scored is not None:
        for row in np.unique(scored.known_user, return_index=True)[1]:
            user, group = int(scored.known_user[row]), int(scored.table.group[row])
            if user >= 0:
                metadata[user] = scored.table.metadata[row]
                groups[user] = scored.table.groups[group] if group >= 0 else None
    weights = UserWeights(policy.model, config.latent, users, policy.metadata_encoder)
    found = weights.posterior(None, list(users.names), metadata).exp().double().numpy()
    known = groups if any(group is not None for group in groups) else []
    return People(found, list(users.names) if names else [], known, config.provenance.get("training_users"))


def _compared(
    evaluation: EvaluationReport,
    rows: Rows,
    against: Mapping[str, Callable[[], MixturePolicy]],
    cache: StateCache | None,
    options: ReportOptions,
    absent: dict[str, str],
) -> dict[str, Any]:
    """Other policies on the same rows, and paired differences from them and from less of our own."""
    found, theirs = {}, {}
    if evaluation.personalised is not None:
        theirs["the gate alone"] = evaluation.predictions["population"]
    mine = evaluation.predictions["personalised"]
    for name, load in against.items():
        found[name] = evaluate(load(), rows, name=name, cache=cache, seed=options.seed, new_user_context=())
        other = found[name].predictions["personalised"]
        if len(other.logit) == len(mine.logit):
            theirs[name] = other
        else:
            absent[f"against {name}"] = (
                f"{name} leaves other rows out (max_length, ties), so no paired difference is taken"
            )
    gains = {name: _gain(mine, other, evaluation.user, options.seed) for name, other in theirs.items()}
    return {"against": found, "gains": gains}


def _gain(mine: Predictions, theirs: Predictions, user: np.ndarray, seed: int) -> Gain:
    accuracy = paired_difference(hits(mine.logit), hits(theirs.logit), user, seed=seed)
    return Gain(accuracy, paired_difference(-mine.log_prob, -theirs.log_prob, user, seed=seed))
