"""Arguments of TRL's trainers that have no meaning here."""

from __future__ import annotations

from typing import Any

_REFUSED = {
    "ref_model": "the frozen base is the reference of every expert, and its log-probabilities come from the same pass",
    "peft_config": "choose experts with branch_depth=, head=, expert_rank= and lora_alpha=",
    "data_collator": "batches come from a table of comparisons with prefmix's own collator",
}


def refuse_arguments(**arguments: Any) -> None:
    """Refuses what TRL's trainer takes and this one cannot use, with the reason.

    Raises:
        ValueError: one of them is not None.
    """
    problems = [f"{name} must be None: {_REFUSED[name]}" for name, value in arguments.items() if value is not None]
    if problems:
        raise ValueError("\n".join(problems))
