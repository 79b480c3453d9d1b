"""Decoding with K heads on one trunk: the trunk reads a token once, whatever K is.

Legend: B sequences, L prompt length, K experts, D hidden, V vocabulary, M kept sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prefmix.experts.growing_cache import growing_cache
from prefmix.experts.heads import LogitFunction
from prefmix.experts.interface import AbstractExpertDecoder
from prefmix.experts.trunk import run_trunk


class HeadDecoder(AbstractExpertDecoder):
    """One KV cache and the last state of every sequence; heads are applied when logits are asked for."""

    def __init__(
        self,
        base_model: PreTrainedModel,
        logit_function: LogitFunction,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        applied: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Reads left-padded prompts (the last column holds a token of every prompt), inside `applied()`."""
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask: a prompt ends in padding; pad prompts on the left to decode")
        self._model = base_model
        self._logit_function, self._applied = logit_function, applied
        self._cache = growing_cache(base_model.config)
        self._mask = attention_mask
        self._hidden = self._read(input_ids)

    @torch.no_grad()
    def _read(self, tokens: Int[Tensor, "B M"]) -> Float[Tensor, "B D"]:
        with self._applied():
            output = run_trunk(self._model, tokens, self._mask, cache=self._cache)
        return output.last_hidden_state[:, -1]

    @torch.no_grad()
    def logits(self) -> Float[Tensor, "B K V"]:
        """Float32 next-token logits of every expert after the tokens read so far."""
        return self._logit_function(self._hidden)

    def append(self, tokens: Int[Tensor, "B"]) -> None:
        """Reads one more token of every sequence."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._hidden = self._read(tokens[:, None])

    def select(self, index: Int[Tensor, "M"]) -> None:
        """Keeps the sequences `index`, in that order."""
        self._cache.batch_select_indices(index)
        self._mask, self._hidden = self._mask[index], self._hidden[index]
