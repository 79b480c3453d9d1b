"""States of the frozen trunk, computed once per text and kept: in a memory-mapped file or in memory.

The trunk never changes, so an epoch over cached states costs the heads alone. A cache is found by what it was computed
from (base weights, token ids, type, format), never by a name, so it cannot be stale; and a text that any earlier table
of the same base holds is copied from there (see `known_texts`).

Legend: N texts, P prompts, T completion tokens of all texts, t those of a batch, D hidden.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.data.cache_folder import cache_folder
from prefmix.data.comparisons import TextTable
from prefmix.experts.base_model import BaseModel
from prefmix.experts.interface import PackedStates
from prefmix.experts.known_texts import find_known_texts, text_keys
from prefmix.experts.text_pass import TextBatch, predicted_lengths, read_prompts, read_texts
from prefmix.experts.trunk_files import (
    FORMAT_VERSION,
    DamagedCache,
    map_hidden,
    new_folder,
    read_tables,
    write_tables,
)

# 65,536 states of a 7B model in bfloat16 take half a gigabyte.
_COPIED_TOKENS = 65_536


class TrunkStates:
    """Trunk states of N texts.

    Attributes:
        completion_mean: [N, D] float32 mean state at each text's completion tokens.
        prompt_mean: [P, D] float32 mean state at each prompt's tokens.
        folder: where they lie on disk, or None.
    """

    def __init__(self, hidden: Float[Tensor, "T D"], tables: dict[str, Tensor], folder: Path | None = None) -> None:
        """Wraps states in text order; `tables` holds offsets [N+1], targets [T], completion_mean and prompt_mean."""
        self._hidden, self._targets = hidden, tables["targets"]
        self._offsets = tables["offsets"].numpy()
        self._prompt_index = tables["prompt_index"].numpy()
        self.completion_mean: Float[Tensor, "N D"] = tables["completion_mean"]
        self.prompt_mean: Float[Tensor, "P D"] = tables["prompt_mean"]
        self.folder = folder

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        """T, completion tokens of all texts."""
        return len(self._targets)

    def gather(self, text_ids: Int[np.ndarray, "n"] | Int[Tensor, "n"] | Sequence[int]) -> dict[str, Tensor]:
        """The packed states of some texts, in the order given.

        Returns:
            hidden [t, D], targets [t] and segments [t] (0..n-1), the fields of `PackedStates`.
        """
        ids = np.asarray(text_ids, dtype=np.int64)
        lengths = self._offsets[ids + 1] - self._offsets[ids]
        rows = torch.from_numpy(_ragged_rows(self._offsets[ids], lengths))
        segments = torch.from_numpy(np.repeat(np.arange(len(ids)), lengths))
        return {"hidden": self._hidden[rows], "targets": self._targets[rows], "segments": segments}

    def batch(self, text_ids: Int[np.ndarray, "n"], found: Int[np.ndarray, "n"]) -> TextBatch:
        """The texts `found` as if they had just been read, under the ids that they have in another table."""
        packed = PackedStates(**self.gather(found), num_texts=len(found))
        return TextBatch(text_ids, packed, self.completion_mean[found], self.prompt_mean[self._prompt_index[found]])


def build_trunk_states(
    base: BaseModel,
    texts: TextTable,
    *,
    mode: Literal["disk", "memory"] = "disk",
    cache_dir: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> TrunkStates:
    """Runs the trunk over every distinct text once, or finds that it was done before.

    Args:
        base: the frozen base.
        texts: N distinct texts.
        mode: "disk" memory-maps a file that later runs reuse; "memory" keeps a tensor for this process.
        cache_dir: folder for "disk"; by default `trunk_states` in the user's cache folder.
        dtype: type of the stored states; a 16-bit type halves the file (2 D bytes a completion token).
        tokens_per_batch: padded tokens that the trunk reads at once; by default what suits the device.
        progress: whether a bar counts tokens on stderr.

    Returns:
        `TrunkStates`, equal to states of single unpadded texts up to rounding.

    Raises:
        ValueError: a text without a completion token, or a disk that is too full.
    """
    lengths = predicted_lengths(texts)
    if mode == "memory":
        width = base.model.get_output_embeddings().weight.shape[1]
        hidden = torch.empty(int(lengths.sum()), width, dtype=dtype)
        return TrunkStates(hidden, _fill(hidden, base, texts, lengths, tokens_per_batch, progress))
    root = Path(cache_dir).expanduser() if cache_dir is not None else cache_folder() / "trunk_states"
    folder = root / cache_key(base, texts, dtype)
    base_key = folder.name.split("-")[0]
    if folder.exists():
        try:
            return _open(folder, dtype)
        except DamagedCache as damage:
            warnings.warn(f"trunk states are damaged and are computed again ({damage})", UserWarning, stacklevel=2)
    with new_folder(folder) as staging:
        width = base.model.get_output_embeddings().weight.shape[1]
        hidden = map_hidden(staging, int(lengths.sum()), width, dtype, create=True)
        known = [
            KnownTexts(here, there, _open(sibling, dtype))
            for sibling, here, there in find_known_texts(root, base_key, text_keys(texts))
        ]
        tables = _fill(hidden, base, texts, lengths, tokens_per_batch, progress, known)
        write_tables(staging, tables, dtype)
    return _open(folder, dtype)


def cache_key(base: BaseModel, texts: TextTable, dtype: torch.dtype) -> str:
    """Name of a cache folder: a hash of what all its texts share (base, type, format), a dash, a hash of the texts."""
    shared = hashlib.sha256(f"trunk states {FORMAT_VERSION} {base.sha256} {dtype}".encode())
    digest = hashlib.sha256()
    for lists in (texts.prompt_ids, texts.completion_ids, texts.prompts):
        digest.update(np.array([len(ids) for ids in lists], dtype=np.int64).tobytes())
        for ids in lists:
            digest.update(np.asarray(ids, dtype=np.int64).tobytes())
    digest.update(np.asarray(texts.prompt_index, dtype=np.int64).tobytes())
    return f"{shared.hexdigest()[:32]}-{digest.hexdigest()[:32]}"


class KnownTexts(NamedTuple):
    """Texts of a new table whose states another table has.

    Attributes:
        here: [n] their ids in the new table.
        there: [n] their ids in the other.
        states: the other's.
    """

    here: Int[np.ndarray, "n"]
    there: Int[np.ndarray, "n"]
    states: TrunkStates


def _open(folder: Path, dtype: torch.dtype) -> TrunkStates:
    tables = read_tables(folder)
    width = tables["completion_mean"].shape[1]
    return TrunkStates(map_hidden(folder, len(tables["targets"]), width, dtype), tables, folder)


def _fill(
    hidden: Float[Tensor, "T D"],
    base: BaseModel,
    texts: TextTable,
    lengths: Int[np.ndarray, "N"],
    tokens_per_batch: int | None,
    progress: bool,
    known: Sequence[KnownTexts] = (),
) -> dict[str, Tensor]:
    """Writes every state into its place in `hidden` and returns the tables."""
    base.model.eval()
    offsets = np.concatenate([[0], lengths.cumsum()])
    targets = torch.empty(len(hidden), dtype=torch.int64)
    completion_mean = torch.zeros(len(texts), hidden.shape[1])
    prompt_mean = torch.zeros(len(texts.prompts), hidden.shape[1])
    unread = np.setdiff1d(
        np.arange(len(texts)), np.concatenate([np.zeros(0, dtype=np.int64), *(k.here for k in known)])
    )
    progress = progress and len(unread) > 0
    read = read_texts(base.model, texts, unread, tokens_per_batch=tokens_per_batch, progress=progress)
    for batch in itertools.chain(_copies(known, lengths), read):
        rows = torch.from_numpy(_ragged_rows(offsets[batch.text_ids], lengths[batch.text_ids]))
        hidden[rows] = batch.packed.hidden.to(hidden.dtype)
        targets[rows] = batch.packed.targets
        completion_mean[batch.text_ids] = batch.completion_mean
        # Texts of one prompt agree on it up to rounding: the trunk is causal.
        prompt_mean[texts.prompt_index[batch.text_ids]] = batch.prompt_mean
    bare = np.setdiff1d(np.arange(len(texts.prompts)), texts.prompt_index)
    bare = np.array([p for p in bare if len(texts.prompts[p])], dtype=np.int64)
    if len(bare):
        prompt_mean[bare] = read_prompts(base.model, [texts.prompts[p] for p in bare])
    return {
        "offsets": torch.from_numpy(offsets),
        "prompt_index": torch.from_numpy(np.asarray(texts.prompt_index, dtype=np.int64)),
        "text_keys": torch.from_numpy(text_keys(texts)),
        "targets": targets,
        "completion_mean": completion_mean,
        "prompt_mean": prompt_mean,
    }


def _copies(known: Sequence[KnownTexts], lengths: Int[np.ndarray, "N"]) -> Iterator[TextBatch]:
    """Known texts a few at a time: the states of all of them need not fit into memory."""
    for part in known:
        piece = (lengths[part.here].cumsum() - 1) // _COPIED_TOKENS
        for rows in np.split(np.arange(len(piece)), np.flatnonzero(np.diff(piece)) + 1):
            yield part.states.batch(part.here[rows], part.there[rows])


def _ragged_rows(starts: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "n"]) -> Int[np.ndarray, "t"]:
    """starts[0], starts[0]+1, ..., (lengths[0] of them), starts[1], ..."""
    before = lengths.cumsum() - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
