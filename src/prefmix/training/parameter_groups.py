"""Which part of a mixture learns at which rate."""

from __future__ import annotations

from typing import Any

from prefmix.policy.mixture_model import MixtureModel
from prefmix.training.config import MixtureConfig


def parameter_groups(mixture: MixtureModel, args: MixtureConfig) -> list[dict[str, Any]]:
    """Experts at `learning_rate`, a trained trunk at `trunk_learning_rate`, the gate at `gate_learning_rate`.

    The gate has a prior of its own, and no weight decay.
    """
    shared = mixture.experts.shared_parameters()
    known = {id(p) for p in shared}
    experts = [p for p in mixture.experts.parameters() if p.requires_grad and id(p) not in known]
    gate = [p for p in mixture.gate.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": experts, "weight_decay": args.weight_decay}]
    if shared:
        rate = args.trunk_learning_rate or args.learning_rate
        groups.append({"params": shared, "weight_decay": args.weight_decay, "lr": rate})
    if gate:
        groups.append({"params": gate, "weight_decay": 0.0, "lr": args.gate_learning_rate})
    return groups
