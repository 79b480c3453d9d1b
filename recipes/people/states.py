"""What the language model says about the texts: read once, kept, and looked up by text.

Legend: N texts, D hidden, P features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.tokenization import tokenize_rows
from prefmix.experts.base_model import BaseModel
from prefmix.experts.trunk_cache import build_trunk_states
from prefmix.mixture.features import pool_features


class Texts(NamedTuple):
    """Features of a set's texts.

    Attributes:
        index: (prompt, text) -> row of `features`.
        features: [N, P] principal directions of the mean states, and log length.
    """

    index: Mapping[tuple[str, str], int]
    features: Tensor

    def pairs(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """[B] chosen and [B] rejected texts of rows."""
        chosen, rejected = (
            torch.tensor([self.index[row["prompt"], row[side]] for row in rows], dtype=torch.int64)
            for side in ("chosen", "rejected")
        )
        return chosen, rejected


def read_texts(catalogue: Sequence[Mapping[str, Any]], base: BaseModel, work_dir: Path, dim: int) -> Texts:
    """Runs the trunk over every text of a catalogue, or finds what an earlier run kept.

    Args:
        catalogue: rows of `sets.PeopleSet.catalogue`.
        base: the language model.
        work_dir: where states are kept.
        dim: principal directions.
    """
    assert base.tokenizer is not None
    table = tokenize_rows(catalogue, base.tokenizer, progress=False)
    states = build_trunk_states(
        base, table.texts, cache_dir=work_dir / "trunk_states", dtype=base.model.dtype, progress=False
    )
    lengths = torch.tensor([len(ids) for ids in table.texts.completion_ids])
    pooled = pool_features(states.completion_mean, dim, lengths, centre_by=torch.from_numpy(table.texts.prompt_index))
    return Texts(_index(catalogue, table), pooled.features)


def _index(catalogue: Sequence[Mapping[str, Any]], table: ComparisonTable) -> dict[tuple[str, str], int]:
    found = {}
    for place, source in enumerate(table.source_row):
        row = catalogue[source]
        found[row["prompt"], row["chosen"]] = int(table.chosen[place])
        found[row["prompt"], row["rejected"]] = int(table.rejected[place])
    return found
