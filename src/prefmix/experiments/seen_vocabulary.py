"""A smaller output vocabulary: the base model cut to the tokens that the texts of an experiment use.

The output head is most of the cost of training heads on a CPU, and it grows with the vocabulary. A model that knows
only the tokens at hand is another (and easier) language model, so results with it are labelled `vocabulary=seen`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.tokenization import tokenize_rows
from prefmix.experts.base_model import BaseModel, load_base

Rows = Sequence[Mapping[str, Any]]


def seen_vocabulary(splits: Sequence[Rows], base: BaseModel, folder: Path) -> tuple[BaseModel, list[list[dict]]]:
    """The base cut to the tokens of some rows, and the rows with token ids in the smaller vocabulary.

    Args:
        splits: sets of rows with text columns.
        base: the whole base model.
        folder: where the cut model is written, so that policies can name it by a path.

    Returns:
        The cut base, and for each set its rows with `prompt_ids`, `chosen_ids` and `rejected_ids` instead of texts.
    """
    assert base.tokenizer is not None
    tables = [tokenize_rows(rows, base.tokenizer, progress=False) for rows in splits]
    special = [i for i in (base.tokenizer.pad_token_id, base.tokenizer.eos_token_id) if i is not None]
    seen = np.unique(np.concatenate([special, *(_token_ids(table) for table in tables)]))
    position = np.full(base.model.config.vocab_size, -1)
    position[seen] = np.arange(len(seen))
    cut = cut_model(base.model, torch.from_numpy(seen))
    cut.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return load_base(folder), [_with_ids(rows, table, position) for rows, table in zip(splits, tables)]


def cut_model(model: PreTrainedModel, seen: torch.Tensor) -> PreTrainedModel:
    """The same network with the embedding and output rows of the tokens `seen` [V'] only.

    Its trunk states equal the whole model's on texts of these tokens; its probabilities are the whole model's,
    renormalised over them.
    """
    config = type(model.config).from_dict({**model.config.to_dict(), "vocab_size": len(seen), "pad_token_id": None})
    config.bos_token_id = config.eos_token_id = None
    cut: Any = type(model)(config)
    cut = cut.to(model.dtype)
    state = model.state_dict()
    names = [name for name, tensor in state.items() if tensor.shape[:1] == (model.config.vocab_size,)]
    cut.load_state_dict({name: tensor[seen] if name in names else tensor for name, tensor in state.items()})
    cut.tie_weights()
    return cut.eval()


def _token_ids(table: ComparisonTable) -> np.ndarray:
    texts = table.texts
    return np.concatenate([np.asarray(ids, dtype=np.int64) for ids in (*texts.prompts, *texts.completion_ids)])


def _with_ids(rows: Rows, table: ComparisonTable, position: np.ndarray) -> list[dict]:
    """Rows that training keeps, their texts replaced by ids of the smaller vocabulary."""
    texts, found = table.texts, []
    for i, source in enumerate(table.source_row):
        kept = {name: value for name, value in rows[source].items() if name not in ("prompt", "chosen", "rejected")}
        chosen, rejected = table.chosen[i], table.rejected[i]
        ids = {
            "prompt_ids": texts.prompt_ids[chosen],
            "chosen_ids": texts.completion_ids[chosen],
            "rejected_ids": texts.completion_ids[rejected],
        }
        found.append(kept | {name: position[np.asarray(value, dtype=np.int64)].tolist() for name, value in ids.items()})
    return found
