"""Batches of comparisons in which every distinct text stands once.

Legend: B comparisons, N distinct texts of the batch, L padded length, T completion tokens, D hidden, P prompts,
M metadata features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from prefmix.data.comparisons import ComparisonTable

States = Callable[[np.ndarray], Mapping[str, Tensor]]  # text ids [N] -> hidden [T, D], targets [T], segments [T]


class ComparisonDataset(Dataset[int]):
    """The positions 0..B-1 of a table; what stands there is the collator's business.

    Args:
        table: the comparisons.
        latent_group: [B] int64, the group of each comparison, from `users.latent_groups`; None: each its own.
    """

    def __init__(self, table: ComparisonTable, latent_group: np.ndarray | None = None) -> None:
        self.table = table
        self.latent_group = np.arange(len(table)) if latent_group is None else latent_group
        assert len(self.latent_group) == len(table)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> int:
        return index


class ComparisonCollator:
    """Makes a batch from positions in a table.

    Without cached states the texts come as right-padded token ids, as TRL's collator lays them out, but each once.
    With two comparisons over three texts, `prompt_ids=[[1, 2, 3], [1, 2, 3], [7, 8]]`,
    `completion_ids=[[4, 5], [6], [9]]`, `chosen=[0, 1]`, `rejected=[1, 0]`, and `pad_token_id=0`:

    ```python
    >>> collator([0, 1])
    {'row': tensor([0, 1]),
     'chosen': tensor([0, 1]),            # local: positions in text_ids
     'rejected': tensor([1, 0]),
     'text_ids': tensor([0, 1]),          # global: positions in the table, ascending
     'user': tensor([0, -1]),
     'group': tensor([0, 1]),
     'weight': tensor([1.0000, 0.5000]),
     'prompt': tensor([0, 0]),
     'input_ids': tensor([[1, 2, 3, 4, 5],
                          [1, 2, 3, 6, 0]]),
     'attention_mask': tensor([[1, 1, 1, 1, 1],
                               [1, 1, 1, 1, 0]]),
     'completion_mask': tensor([[0, 0, 0, 1, 1],
                                [0, 0, 0, 1, 0]])}
    ```

    A position ~i (negative) is a copy of row i that only fills the batch (see `PromptGroupedSampler`): its weight is 0,
    and `row` stays negative, so that whoever remembers rows can leave it out.

    Where the table has them, `tie` [B] (bool) and `label` [B] come too, and rankings as `ranked` [M], positions in
    text_ids, best first, row after row, with `ranked_size` [B] and `ranked_stages` [B].

    With `states` the last three keys give way to what `states(text_ids)` returns: `hidden` [T, D], `targets` [T] and
    `segments` [T].

    Args:
        table: the comparisons.
        group: [B_all] int64, the latent group of every comparison.
        pad_token_id: fills the right of `input_ids`.
        states: gives the cached trunk states of texts.
        prompt_states: [P, D] pooled trunk states of the distinct prompts; adds `prompt_states` [B, D].
        metadata: [B_all, M] encoded metadata; adds `metadata` [B, M].
    """

    def __init__(
        self,
        table: ComparisonTable,
        *,
        group: np.ndarray,
        pad_token_id: int,
        states: States | None = None,
        prompt_states: Float[Tensor, "P D"] | None = None,
        metadata: Float[Tensor, "B_all M"] | None = None,
    ) -> None:
        assert len(group) == len(table)
        assert metadata is None or len(metadata) == len(table)
        self._table = table
        self._group = np.asarray(group, dtype=np.int64)
        self._prompt = table.prompt
        self._pad_token_id = pad_token_id
        self._states = states
        self._prompt_states = prompt_states
        self._metadata = metadata
        columns = {"tie": table.tie, "label": table.label}
        self._columns = {name: column for name, column in columns.items() if column is not None}
        self._flat = None if states is not None else _FlatTexts(table)

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        place = np.asarray(rows, dtype=np.int64)
        row = np.where(place < 0, ~place, place)
        table = self._table
        ranked = None if table.ranked is None else table.ranked.select(row)
        named = [table.chosen[row], table.rejected[row], *(() if ranked is None else (ranked.texts,))]
        text_ids, local = np.unique(np.concatenate(named), return_inverse=True)
        batch = {
            "row": place,
            "chosen": local[: len(row)],
            "rejected": local[len(row) : 2 * len(row)],
            "text_ids": text_ids,
            "user": table.user[row],
            "group": self._group[row],
            "weight": np.where(place < 0, 0, table.weight[row]).astype(table.weight.dtype),
            "prompt": self._prompt[row],
        }
        if ranked is not None:
            order = {"ranked": local[2 * len(row) :], "ranked_size": ranked.size, "ranked_stages": ranked.stages}
            batch.update(order)
        batch.update((name, column[row]) for name, column in self._columns.items())
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}
        if self._states is not None:
            tensors.update(self._states(text_ids))
        else:
            assert self._flat is not None
            tensors.update(self._flat.padded(text_ids, self._pad_token_id))
        if self._prompt_states is not None:
            tensors["prompt_states"] = self._prompt_states[tensors["prompt"]]
        if self._metadata is not None:
            tensors["metadata"] = self._metadata[torch.from_numpy(row)]
        return tensors


class _FlatTexts:
    """All token ids end to end, so that a padded batch is one gather instead of a loop over texts."""

    def __init__(self, table: ComparisonTable) -> None:
        texts = table.texts
        self._prompt_length = np.array([len(ids) for ids in texts.prompt_ids], dtype=np.int64)
        self._length = self._prompt_length + np.array([len(ids) for ids in texts.completion_ids], dtype=np.int64)
        self._start = np.array(list(accumulate(self._length.tolist(), initial=0)), dtype=np.int64)
        self._ids = np.empty(self._start[-1], dtype=np.int64)
        for start, prompt, completion in zip(self._start, texts.prompt_ids, texts.completion_ids, strict=False):
            middle = start + len(prompt)
            self._ids[start:middle] = prompt
            self._ids[middle : middle + len(completion)] = completion

    def padded(self, text_ids: np.ndarray, pad_token_id: int) -> dict[str, Tensor]:
        length = self._length[text_ids][:, None]
        position = np.arange(length.max())[None, :]
        inside = position < length
        # Positions in the padding read token 0 of everything; `inside` hides it.
        ids = self._ids[np.where(inside, self._start[text_ids][:, None] + position, 0)]
        return {
            "input_ids": torch.from_numpy(np.where(inside, ids, pad_token_id)),
            "attention_mask": torch.from_numpy(inside.astype(np.int64)),
            "completion_mask": torch.from_numpy(
                (inside & (position >= self._prompt_length[text_ids][:, None])).astype(np.int64)
            ),
        }
