"""One reading of a prompt for all its responses: the prompt's keys and values are computed once and repeated.

Legend: n texts with one prompt of P tokens, L their longest completion, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefmix.data.comparisons import TextTable
from prefmix.experts.trunk import run_trunk

# Below this many tokens a second forward pass costs more than reading the prompt again with every text.
SHORTEST_PROMPT = 12


class PromptStates(NamedTuple):
    """What the trunk says of some texts of one prompt.

    Attributes:
        before: [n, L, D] states at the positions before the completion tokens.
        at: [n, L, D] states at the completion tokens.
        mask: [n, L] 1 on completion tokens.
        completion_ids: [n, L] completion tokens, padded on the right.
        prompt_mean: [D] float32 mean of the states at the prompt's tokens.
    """

    before: Float[Tensor, "n L D"]
    at: Float[Tensor, "n L D"]
    mask: Int[Tensor, "n L"]
    completion_ids: Int[Tensor, "n L"]
    prompt_mean: Float[Tensor, "D"]


def shared_prompt_batches(
    texts: TextTable, text_ids: Int[np.ndarray, "N"], tokens_per_batch: int
) -> tuple[list[np.ndarray], Int[np.ndarray, "M"]]:
    """Batches of two or more texts with one prompt that is long enough to be worth sharing, and the texts left over.

    A batch holds about `tokens_per_batch` tokens, repeated prompts counted, since their keys and values are.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for text in text_ids.tolist():
        by_prompt.setdefault(tuple(texts.prompt_ids[text]), []).append(text)
    batches: list[np.ndarray] = []
    rest: list[int] = []
    for prompt, members in by_prompt.items():
        if len(members) < 2 or len(prompt) < SHORTEST_PROMPT:
            rest.extend(members)
            continue
        members.sort(key=lambda text: -len(texts.completion_ids[text]))
        batches.extend(_chunks(texts, members, len(prompt), tokens_per_batch))
    return batches, np.array(sorted(rest), dtype=np.int64)


def _chunks(texts: TextTable, members: Sequence[int], prompt_length: int, tokens: int) -> Iterator[np.ndarray]:
    start = 0
    while start < len(members):
        size = max(1, tokens // (prompt_length + len(texts.completion_ids[members[start]])))
        yield np.array(members[start : start + size], dtype=np.int64)
        start += size


@torch.no_grad()
def read_shared_prompt(
    model: PreTrainedModel, texts: TextTable, text_ids: Int[np.ndarray, "n"], device: torch.device
) -> PromptStates | None:
    """Reads the prompt once, then all completions on top of it.

    Returns:
        The states, equal to those of whole texts up to rounding, or None where the model keeps another kind of state
        than keys and values and so cannot repeat it.
    """
    prompt = torch.tensor([list(texts.prompt_ids[text_ids[0]])], dtype=torch.int64, device=device)
    first = run_trunk(model, prompt, torch.ones_like(prompt), use_cache=True)
    cache = getattr(first, "past_key_values", None)
    if not isinstance(cache, DynamicCache):
        return None
    completions = [list(texts.completion_ids[text]) for text in text_ids]
    longest = max(len(ids) for ids in completions)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in completions], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in completions], device=device)
    cache.batch_repeat_interleave(len(completions))
    whole_mask = torch.cat([torch.ones_like(prompt).expand(len(ids), -1), mask], dim=1)
    at = run_trunk(model, ids, whole_mask, past_key_values=cache, use_cache=True).last_hidden_state
    states = first.last_hidden_state
    before = torch.cat([states[:, -1:].expand(len(ids), -1, -1), at[:, :-1]], dim=1)
    return PromptStates(before, at, mask, ids, states[0].float().mean(0))
