"""What the gate says of kinds of prompts and of metadata, and what people with such metadata turned out to be.

Legend: B rows, P prompts, K experts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from prefmix.evaluation.evaluator import ScoredTable
from prefmix.experiments.run_data import GateView
from prefmix.mixture.features import pool_features
from prefmix.mixture.kmeans import kmeans
from prefmix.policy.metadata_fields import silent_fields
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.prompt_states import pooled_prompt_states

MOST_PROMPTS, CLUSTERS, MOST_VALUES, MOST_FIELDS = 400, 8, 8, 6


def gate_views(policy: MixturePolicy, scored: ScoredTable, weights: np.ndarray) -> list[GateView]:
    """Mean weights by prompt cluster (where the gate reads prompts) and by each field of metadata.

    Args:
        policy: its gate.
        scored: held-out rows.
        weights: [B, K] what the policy uses for each row.
    """
    if policy.config.num_experts == 1:
        return []
    terms, gate = policy.model.gate.terms, scored.gate_log_weights.exp().numpy()
    views = [_by_prompt(policy, scored, gate)] if "prompt" in terms else []
    reads = "metadata" in terms
    fields = Counter(name for row in scored.table.metadata for name in row)
    encoder = policy.metadata_encoder
    heard = set(encoder.field_names if encoder else ()) - set(silent_fields(policy.model.gate, encoder))
    for name in sorted((name for name, _ in fields.most_common(MOST_FIELDS)), key=lambda name: name not in heard):
        values = [row.get(name) for row in scored.table.metadata]
        view = by_metadata(name, values, gate if reads else weights, reads, name in heard)
        if view is not None:
            views.append(view)
    return views


def by_metadata(name: str, values: list[Any], weights: np.ndarray, reads: bool, heard: bool = True) -> GateView | None:
    """Mean weights of rows by value (numbers by quartile); None where there is a single kind.

    Args:
        name: of the field.
        values: B values, None where a row has none.
        weights: [B, K].
        reads: whether the gate reads metadata, for the caption.
        heard: whether this field has weight in it, for the caption.
    """
    labels = _kinds(values)
    rows = []
    for label in dict.fromkeys(sorted(label for label in labels if label is not None)):
        chosen = np.array([found == label for found in labels])
        rows.append((label[1], int(chosen.sum()), weights[chosen].mean(axis=0).tolist()))
    if len(rows) < 2:
        return None
    said = "The gate does not read it: what these people turned out to be."
    if reads:
        said = "What the gate alone says of such rows."
        said += "" if heard else " This field has no weight in it: differences come from other fields of the same rows."
    return GateView(f"By {name}", rows, said)


def _kinds(values: list[Any]) -> list[tuple[float, str] | None]:
    """The kind of each value, as (place, label)."""
    given = [value for value in values if value is not None]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
    if numeric and len(set(given)) > MOST_VALUES:
        edges = np.quantile(given, [0.25, 0.5, 0.75])
        ends = [float(min(given)), *map(float, edges), float(max(given))]
        place = [None if value is None else int(np.searchsorted(edges, value)) for value in values]
        return [None if p is None else (float(p), f"{ends[p]:g} to {ends[p + 1]:g}") for p in place]
    if numeric:
        return [None if value is None else (float(value), f"{value:g}") for value in values]
    common = [value for value, _ in Counter(map(str, given)).most_common(MOST_VALUES)]
    order = {value: float(place) for place, value in enumerate(sorted(common))}
    return [
        None if value is None else (order.get(str(value), len(order)), str(value) if str(value) in order else "other")
        for value in values
    ]


def _by_prompt(policy: MixturePolicy, scored: ScoredTable, gate: np.ndarray) -> GateView:
    """Clusters of prompts by the states that the gate reads, each named by the prompt nearest its centre."""
    table = scored.table
    distinct, first, count = np.unique(table.prompt, return_index=True, return_counts=True)
    shown = np.linspace(0, len(distinct) - 1, min(len(distinct), MOST_PROMPTS)).round().astype(int)
    prompts = [list(table.texts.prompts[distinct[i]]) for i in shown]
    if len(prompts) <= CLUSTERS:
        label = np.arange(len(prompts))
        nearest = [int(place) for place in label]
    else:
        states = pool_features(pooled_prompt_states(policy.model.experts.base_model, prompts), 16).features
        found = kmeans(states, CLUSTERS, torch.Generator().manual_seed(0))
        label = found.label.numpy()
        distance = torch.cdist(states, found.centres)
        nearest = [int(distance[:, c].argmin()) for c in range(CLUSTERS)]
    rows = []
    for cluster in range(len(nearest)):
        members = shown[label == cluster]
        if len(members):
            mean = np.average(gate[first[members]], axis=0, weights=count[members])
            name = str(policy.tokenizer.decode(prompts[nearest[cluster]], skip_special_tokens=True))
            rows.append((name, int(count[members].sum()), mean.tolist()))
    rows.sort(key=lambda row: int(np.argmax(row[2])) - float(max(row[2])))
    kind = (
        "Each prompt."
        if len(prompts) <= CLUSTERS
        else f"{len(nearest)} clusters, each named by its most typical prompt."
    )
    return GateView("By prompt", rows, f"{kind} What the gate alone says.")
