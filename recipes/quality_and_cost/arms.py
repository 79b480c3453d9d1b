"""Which models stand side by side, and which learning rates each may choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EVERYWHERE = -1


@dataclass(frozen=True)
class Arm:
    """One kind of expert.

    Attributes:
        name: in the table.
        family: points of one family share a colour.
        options: fields of `MixtureConfig` that make it what it is; empty for TRL's trainer.
        rates: learning rates that validation rows choose from.
        rate_of: take the rate that this arm chose, which has the same kind of parameters.
        more_rates: further rates, each three times beyond the best one, while that stands at the edge of the grid.
        seeds: the first one chooses the rate.
        epochs: passes over the rows.
        more_pairs: train on more rows.
        trl: TRL's `DPOTrainer` with PEFT's LoRA on all linear layers.
    """

    name: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    rate_of: str | None = None
    more_rates: int = 0
    seeds: tuple[int, ...] = (0,)
    epochs: int = 1
    more_pairs: bool = False
    trl: bool = False


def all_arms() -> dict[str, Arm]:
    """All arms, the most telling ones first: a run that is stopped has compared something.

    Ranks 4 and 64 take the rate that rank 16 chose, and two blocks that of four: parameters of one kind, whose scale
    does not depend on the rank.
    """
    low_rank, full, lora = (3e-4, 1e-3, 3e-3), (1e-5, 3e-5, 1e-4), (1e-4, 3e-4, 9e-4)
    hidden, blocks, everywhere = "head, hidden, r=16", "LoRA, last 4 blocks, r=16", "LoRA, all blocks, r=16"
    default = {"branch_depth": 0, "head": "hidden", "expert_rank": 16}
    arms = [
        _head("hidden", 16, low_rank),
        _branch(4, 16, lora),
        _branch(EVERYWHERE, 16, lora),
        # The same model, loss and gradient as the arm above (tests/training/test_branches.py), so the same rate.
        Arm("TRL LoRA, r=16", "TRL", rate_of=everywhere, trl=True),
        _head("full", 0, full),
        _branch(2, 16, blocks),
        _head("logit", 16, low_rank),
        _head("hidden", 4, hidden),
        _head("hidden", 64, hidden),
        Arm(f"{hidden}, 4x the pairs", "head: more steps", default, rate_of=hidden, seeds=(0, 1), more_pairs=True),
        Arm(f"{hidden}, 4 epochs", "head: more steps", default, rate_of=hidden, seeds=(0, 1), epochs=4),
        _branch(4, 64, blocks),
        _branch(4, 4, blocks),
        _head("logit", 64, "head, logit, r=16"),
        _head("logit", 4, "head, logit, r=16"),
        _branch(2, 64, blocks),
        _branch(2, 4, blocks),
        Arm(
            "head, logit, r=16, 4x the pairs",
            "head: more steps",
            default | {"head": "logit"},
            rate_of="head, logit, r=16",
            seeds=(0, 1),
            more_pairs=True,
        ),
        _branch(EVERYWHERE, 64, everywhere),
        _branch(EVERYWHERE, 4, everywhere),
    ]
    return {arm.name: arm for arm in arms}


def _head(kind: str, rank: int, rates: tuple[float, ...] | str) -> Arm:
    name = "head, full" if kind == "full" else f"head, {kind}, r={rank}"
    options = {"branch_depth": 0, "head": kind} | ({} if kind == "full" else {"expert_rank": rank})
    return Arm(name, f"head: {kind}", options, **_choice(rates), more_rates=3, seeds=(0, 1))


def _branch(depth: int, rank: int, rates: tuple[float, ...] | str) -> Arm:
    blocks = "all blocks" if depth == EVERYWHERE else f"last {depth} blocks"
    options = {"branch_depth": depth, "expert_rank": rank}
    return Arm(f"LoRA, {blocks}, r={rank}", f"LoRA: {blocks}", options, **_choice(rates), more_rates=3)


def _choice(rates: tuple[float, ...] | str) -> dict[str, Any]:
    return {"rate_of": rates} if isinstance(rates, str) else {"rates": rates}
