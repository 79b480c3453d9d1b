"""The tokenized preference data in columns: every distinct text once, and comparisons that point at texts.

Legend: N distinct texts, P distinct prompts, B comparisons, U users. Everything here is numpy; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TextTable:
    """Distinct (prompt, response) token sequences.

    Two comparisons that show the same response to the same prompt share one entry, so a model reads it once however
    many people judged it. The key is the whole token sequence and where its completion starts.

    Attributes:
        prompt_ids: N lists of prompt token ids (already truncated).
        completion_ids: N lists of completion token ids (already truncated, never empty).
        prompt_index: [N] int64, the index of the text's prompt among the P distinct prompts.
        prompts: P lists of token ids, the distinct prompts.
    """

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    prompt_index: np.ndarray
    prompts: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Sum of completion lengths over the distinct texts, in tokens."""
        return sum(len(ids) for ids in self.completion_ids)


@dataclass(frozen=True)
class RankedTexts:
    """The texts of B rows in their order, ragged; a pair has two.

    Attributes:
        texts: [M] int64, index of every text, best first, row after row.
        size: [B] int64, texts of each row, at least 2.
        stages: [B] int64, how many places were judged: size - 1, or 1 for the best of n.
    """

    texts: np.ndarray
    size: np.ndarray
    stages: np.ndarray

    def select(self, index: np.ndarray) -> RankedTexts:
        """The rows `index` ([M] int64)."""
        size = self.size[index]
        first = np.repeat((np.cumsum(self.size) - self.size)[index], size)
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        return RankedTexts(self.texts[first + within], size, self.stages[index])


@dataclass(frozen=True)
class ComparisonTable:
    """B comparisons over a `TextTable`, with who made them.

    Attributes:
        texts: the distinct texts.
        chosen: [B] int64, index of the preferred text (the best of a ranking, either of a tie).
        rejected: [B] int64, index of the other text (the last of a ranking).
        user: [B] int64, index into `users`; -1 where the row names no user.
        users: U user names, in order of first appearance (or the order of the training set, see `tokenize_rows`).
        weight: [B] float32, row weights (1 where absent).
        group: [B] int64, index into `groups`; -1 where absent. The true group, read by evaluation, the oracle and
            `init="labels"` only.
        groups: the group names, sorted (after the given ones, see `tokenize_rows`).
        metadata: B mappings; fields named `user_*` are constant within a user.
        source_row: [B] int64, the zero-based row of the input (rows that were dropped leave gaps).
        dropped: reason -> count of rows left out where TRL leaves them out too (and ties).
        tie: [B] bool, both were judged equal; None: no row is a tie.
        label: [B] float32 in [0.5, 1], probability that `chosen` is the better one; None: 1 everywhere.
        ranked: the texts of all rows in order; None: every row is a pair.
        form: of the rows, `standard` (plain text), `conversational` (messages) or `tokenized`; None: unknown.
    """

    texts: TextTable
    chosen: np.ndarray
    rejected: np.ndarray
    user: np.ndarray
    users: tuple[str, ...]
    weight: np.ndarray
    group: np.ndarray
    groups: tuple[str, ...]
    metadata: Sequence[Mapping[str, Any]]
    source_row: np.ndarray
    dropped: Mapping[str, int] = field(default_factory=dict)
    tie: np.ndarray | None = None
    label: np.ndarray | None = None
    ranked: RankedTexts | None = None
    form: str | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def prompt(self) -> np.ndarray:
        """[B] int64, index of each comparison's prompt among the distinct prompts."""
        return self.texts.prompt_index[self.chosen]

    @property
    def compared(self) -> np.ndarray:
        """Indices of the texts that rows name; with repetitions, in no order."""
        return np.concatenate([self.chosen, self.rejected]) if self.ranked is None else self.ranked.texts

    def select(self, rows: np.ndarray) -> ComparisonTable:
        """The comparisons `rows` ([M] int64 or [B] bool), over the same texts, users and groups."""
        index = np.flatnonzero(rows) if rows.dtype == bool else rows
        return ComparisonTable(
            texts=self.texts,
            chosen=self.chosen[index],
            rejected=self.rejected[index],
            user=self.user[index],
            users=self.users,
            weight=self.weight[index],
            group=self.group[index],
            groups=self.groups,
            metadata=[self.metadata[i] for i in index.tolist()],
            source_row=self.source_row[index],
            dropped=self.dropped,
            tie=None if self.tie is None else self.tie[index],
            label=None if self.label is None else self.label[index],
            ranked=None if self.ranked is None else self.ranked.select(index),
            form=self.form,
        )
