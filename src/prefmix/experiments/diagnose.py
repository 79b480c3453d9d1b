"""Before training: what rows alone say. After training: what a policy looks like on rows.

Legend: B comparisons, K experts, S starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefmix.data.schema import PreferenceRow, check_rows
from prefmix.experiments.diagnose_rows import diagnose_columns, row_columns
from prefmix.experiments.diagnosis import Diagnosis, Finding

if TYPE_CHECKING:
    from prefmix.evaluation.cached_states import StateCache
    from prefmix.experiments.diagnose_experts import LearntNoise, ScoredRows
    from prefmix.policy.mixture_policy import MixturePolicy


def diagnose_rows(
    rows: Sequence[PreferenceRow], source: str = "rows", *, refit: bool = True, seed: int = 0
) -> Diagnosis:
    """Checks rows before training; nothing is embedded, and only the refit imports torch.

    Args:
        rows: checked rows.
        source: what the diagnosis calls them.
        refit: also plant opposed groups on the rows' own design and see whether they would be found (seconds).
        seed: of permutations and invented answers.
    """
    columns = row_columns(rows)
    findings = diagnose_columns(columns, seed)
    if refit:
        from prefmix.experiments.diagnose_design import simulate_and_refit

        findings.append(simulate_and_refit(columns, seed=seed))
    return Diagnosis(source, findings)


def diagnose_policy(
    policy: MixturePolicy,
    rows: Sequence[Mapping[str, Any]],
    source: str = "policy",
    *,
    cache: StateCache | None = None,
    probe_dim: int = 64,
    restarts: int = 8,
    seed: int = 0,
    scored: ScoredRows | None = None,
    writes: bool = True,
) -> Diagnosis:
    """Checks a trained policy on rows, better on rows that it was not trained on.

    Args:
        policy: the policy.
        rows: preference rows.
        source: what the diagnosis calls the policy.
        cache: where states of texts are found, for scores and the probe's restarts; None: texts are read anew and the
            probe is left out.
        probe_dim: principal directions of the probe.
        restarts: of the probe.
        seed: of the restarts and of what experts write.
        scored: what `scored_rows` would give, where it is known already.
        writes: whether experts write a few responses, which takes seconds.
    """
    from prefmix.experiments.diagnose_experts import annotators, diagnose_scored

    if scored is None and cache is not None:
        from prefmix.experiments.read_rows import cached_rows

        scored = cached_rows(policy, rows, cache)  # the probe's restarts read the same texts
    findings = diagnose_scored(scored_rows(policy, rows) if scored is None else scored, learnt_noise(policy))
    if policy.users.noise is not None:
        findings.append(annotators(policy.users.noise.numpy()))
    if cache is not None and policy.config.num_experts > 1:
        findings += _probe_restarts(policy, rows, cache, probe_dim, restarts, seed)
    if writes:
        from prefmix.experiments.diagnose_writing import writing

        written = writing(policy, rows, seed=seed)
        findings += [] if written is None else [written]
    return Diagnosis(source, findings)


def learnt_noise(policy: MixturePolicy) -> LearntNoise | None:
    """What training learnt of label noise; None where it was given."""
    from prefmix.experiments.diagnose_experts import LearntNoise

    config, each = policy.config, policy.users.noise is not None  # older policies say it by their users alone
    if config.label_noise_update == "fixed" and not each:
        return None
    return LearntNoise(config.label_noise, config.label_noise_prior, each or config.label_noise_update != "global")


def scored_rows(policy: MixturePolicy, rows: Sequence[Mapping[str, Any]]) -> ScoredRows:
    """What the checks read of a policy's scores; rows that training would leave out are left out."""
    from prefmix.experiments.diagnose_experts import ScoredRows

    scored = [entry for entry in policy.score(rows) if "probabilities" in entry]
    position = {row.source_row: row for row in check_rows(rows).rows}
    columns = row_columns([position[entry["row"]] for entry in scored])
    length = np.log(np.maximum(columns.length, 1))

    def stacked(name: str) -> np.ndarray:
        return np.array([entry[name] for entry in scored])

    return ScoredRows(
        rewards_chosen=stacked("rewards/chosen"),
        rewards_rejected=stacked("rewards/rejected"),
        probability=stacked("probabilities"),
        weights=stacked("weights"),
        user=columns.user,
        length_difference=length[columns.chosen] - length[columns.rejected],
    )


def _probe_restarts(
    policy: MixturePolicy,
    rows: Sequence[Mapping[str, Any]],
    cache: StateCache,
    probe_dim: int,
    restarts: int,
    seed: int,
) -> list[Finding]:
    import torch

    from prefmix.data.tokenization import tokenize_rows
    from prefmix.data.users import latent_groups, num_latent_groups
    from prefmix.experiments.diagnose_experts import restart_agreement
    from prefmix.mixture.features import pool_features
    from prefmix.mixture.probe import fit_probe

    table = tokenize_rows(rows, policy.tokenizer, max_length=policy.config.max_length, progress=cache.progress)
    states = cache.states(policy, table)
    if states is None or not len(table.users):
        return []
    lengths = torch.tensor([len(ids) for ids in table.texts.completion_ids])
    prompt = torch.from_numpy(table.texts.prompt_index)
    fit = fit_probe(
        pool_features(states.completion_mean, probe_dim, lengths, centre_by=prompt).features,
        torch.from_numpy(table.chosen),
        torch.from_numpy(table.rejected),
        torch.from_numpy(latent_groups(table, "user")),
        num_latent_groups(table, "user"),
        policy.config.num_experts,
        weight=torch.from_numpy(table.weight),
        restarts=restarts,
        generator=torch.Generator().manual_seed(seed),
    )
    labels = fit.restart_log_resp[:, : len(table.users)].argmax(dim=2).numpy()
    return [restart_agreement(list(labels), fit.restart_evidences.tolist())]
