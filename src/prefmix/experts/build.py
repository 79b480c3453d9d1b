"""From a JSON description to untrained experts: the one place that knows every kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from prefmix.experts.branches import BranchedExperts
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.shared_base import SharedBaseExperts

Builder = Callable[[PreTrainedModel, Mapping[str, Any], torch.Generator | None], AbstractExperts]


def build_experts(
    base_model: PreTrainedModel, description: Mapping[str, Any], generator: torch.Generator | None = None
) -> AbstractExperts:
    """Untrained experts like those that `AbstractExperts.describe` described.

    Args:
        base_model: the base that the description's experts share.
        description: `kind` and the fields of that kind.
        generator: source of the random part of new experts.

    Raises:
        ValueError: a kind or branch depth that this version does not know.
    """
    kind = description.get("kind")
    if kind not in EXPERT_KINDS:
        raise ValueError(f"kind={kind!r}: this prefmix knows experts of kind {', '.join(EXPERT_KINDS)}; update prefmix")
    return EXPERT_KINDS[kind](base_model, description, generator)


def _shared_base(
    base_model: PreTrainedModel, description: Mapping[str, Any], generator: torch.Generator | None
) -> SharedBaseExperts:
    if description.get("branch_depth", 0) != 0:
        raise ValueError(f"kind='shared_base' with branch_depth={description['branch_depth']}: use kind='branched'")
    return SharedBaseExperts(
        base_model, description["num_experts"], description["head"], description["rank"], generator
    )


def _branched(
    base_model: PreTrainedModel, description: Mapping[str, Any], generator: torch.Generator | None
) -> BranchedExperts:
    fields = {name: value for name, value in description.items() if name != "kind"}
    return BranchedExperts(base_model, **fields, generator=generator)


EXPERT_KINDS: dict[str, Builder] = {"shared_base": _shared_base, "branched": _branched}
