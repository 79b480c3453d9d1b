"""Options of training for the worst group (group DRO), and what must hold between them and others. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class GroupRobustOptions:
    """Whose loss is made small: the average row's, or that of the group that fares worst."""

    robust_over: Literal["group", "user"] | None = field(
        default=None,
        metadata={
            "help": "Train for the worst group (group DRO): rows weigh as an adversary says who moves to the groups "
            "that fare badly. Groups are the true ones (the rows' column group) or all users; null: rows count alike."
        },
    )
    robust_step: float = field(
        default=0.05,
        metadata={"help": "robust_over: eta of the adversary's weights, c_g <- c_g exp(eta L_g), per nat and step."},
    )


def robust_problems(values: Mapping[str, Any]) -> list[str]:
    """Why group DRO does not go with other options, or nothing."""
    step, over = values["robust_step"], values["robust_over"]
    problems = [] if 0 < step < float("inf") else [f"robust_step={step!r}: positive, for example 0.05"]
    if over is None:
        if step != GroupRobustOptions.robust_step:
            problems.append("robust_step with robust_over=null: no effect there; use robust_over='group' or 'user'")
        return problems
    if values["dr_dpo_beta"] is not None:
        problems.append(
            f"dr_dpo_beta with robust_over={over!r}: its aggregate of a pass is no sum of rows, so no group has a loss "
            "of its own; leave one of them out"
        )
    return problems
