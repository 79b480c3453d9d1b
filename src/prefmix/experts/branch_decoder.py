"""Decoding with K branches: the trunk reads a token once, each expert's own blocks read it with their own KV cache.

Legend: B sequences, L prompt length, K experts, D hidden, V vocabulary, M kept sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from prefmix.experts.blocks import TopBlocks
from prefmix.experts.heads import LogitFunction
from prefmix.experts.interface import AbstractExpertDecoder
from prefmix.experts.lora import LoraBank, LoraMatrices
from prefmix.experts.trained_trunk import AbstractTrunk
from prefmix.experts.trunk import run_trunk


class ExpertReader(NamedTuple):
    """What makes one expert: its LoRA, and a function from states [B, D] to its logits [B, 1, V]."""

    matrices: Sequence[LoraMatrices]
    logit_function: LogitFunction


class BranchDecoder(AbstractExpertDecoder):
    """K caches that share the trunk's layers; without a trunk (all blocks branched) K separate caches."""

    def __init__(
        self,
        trunk: AbstractTrunk,
        top: TopBlocks | None,
        branches: LoraBank,
        readers: Sequence[ExpertReader],
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
    ) -> None:
        """Reads left-padded prompts (the last column holds a token of every prompt)."""
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask: a prompt ends in padding; pad prompts on the left to decode")
        self._trunk, self._top, self._branches, self._readers = trunk, top, branches, readers
        self._caches = [DynamicCache(config=trunk.model.config) for _ in readers]
        if top is not None:
            # The first cache goes through the trunk, so masks see its layers above the branch too.
            for cache in self._caches[1:]:
                shared = len(cache.layers) - len(top.blocks)
                cache.layers[:shared] = self._caches[0].layers[:shared]
        self._mask = attention_mask
        self._hidden = self._read(input_ids)

    @torch.no_grad()
    def _read(self, tokens: Int[Tensor, "B M"]) -> list[Float[Tensor, "B D"]]:
        if self._top is None:
            return [self._read_alone(reader, cache, tokens) for reader, cache in zip(self._readers, self._caches)]
        first = self._caches[0]
        with self._trunk.applied():
            point = self._top.run_trunk(tokens, self._mask, through=False, cache=first)
        states = []
        for reader, cache in zip(self._readers, self._caches, strict=True):
            with self._branches.applied(reader.matrices):
                states.append(self._top.norm(self._top.replay(point, replace=(first, cache))[:, -1]))
        return states

    def _read_alone(
        self, reader: ExpertReader, cache: DynamicCache, tokens: Int[Tensor, "B M"]
    ) -> Float[Tensor, "B D"]:
        with self._branches.applied(reader.matrices):
            output = run_trunk(self._trunk.model, tokens, self._mask, cache=cache)
        return output.last_hidden_state[:, -1]

    @torch.no_grad()
    def logits(self) -> Float[Tensor, "B K V"]:
        """Float32 next-token logits of every expert after the tokens read so far."""
        each = [reader.logit_function(hidden) for reader, hidden in zip(self._readers, self._hidden, strict=True)]
        return torch.cat(each, dim=1)

    def append(self, tokens: Int[Tensor, "B"]) -> None:
        """Reads one more token of every sequence."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._hidden = self._read(tokens[:, None])

    def select(self, index: Int[Tensor, "M"]) -> None:
        """Keeps the sequences `index`, in that order."""
        layers = {id(layer): layer for cache in self._caches for layer in cache.layers}
        for layer in layers.values():
            layer.batch_select_indices(index)  # type: ignore[union-attr]  # every layer of a DynamicCache has it
        self._mask = self._mask[index]
        self._hidden = [hidden[index] for hidden in self._hidden]
