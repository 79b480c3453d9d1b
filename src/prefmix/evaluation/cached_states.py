"""Trunk states for evaluation, from the cache that training fills and reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from prefmix.data.comparisons import ComparisonTable
from prefmix.experts.base_model import BaseModel
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.experts.trunk_cache import TrunkStates, build_trunk_states

if TYPE_CHECKING:
    from prefmix.policy.mixture_policy import MixturePolicy


class StateCache(NamedTuple):
    """Where states of the frozen trunk are kept between evaluations.

    Attributes:
        mode: `disk`, which training and later evaluations share, or `memory`.
        folder: of `disk`; None: `trunk_states` in the user's cache folder.
        progress: whether a bar counts tokens on stderr.
    """

    mode: Literal["disk", "memory"] = "disk"
    folder: str | Path | None = None
    progress: bool = False

    def states(self, policy: MixturePolicy, table: ComparisonTable) -> TrunkStates | None:
        """States of the table's texts, found or read once; None for experts that read token ids.

        They are found by the content of base and texts (`trunk_cache.cache_key`), so they cannot be of another base.
        """
        experts, config = policy.model.experts, policy.config
        if not isinstance(experts, SharedBaseExperts):
            return None
        base = BaseModel(experts.base_model, policy.tokenizer, config.base_source, config.base_sha256)
        return build_trunk_states(
            base,
            table.texts,
            mode=self.mode,
            cache_dir=self.folder,
            dtype=experts.base_weight.dtype if config.dtype is None else getattr(torch, config.dtype),
            progress=self.progress,
        )
