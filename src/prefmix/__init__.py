"""Mixtures of expert policies from preference data.

Public names are loaded on first use (PEP 562), so `import prefmix` and the light parts of the package (data checks,
options, the command line) never import torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefmix.evaluation.evaluator import evaluate
    from prefmix.policy.mixture_policy import MixturePolicy
    from prefmix.policy.modular import CopyOf, add_expert, remove_expert, replace_expert, soup
    from prefmix.policy.strength import at_strength
    from prefmix.training.config import MixtureConfig
    from prefmix.training.extending import register_estep, register_gate_term, register_loss
    from prefmix.training.trainer import MixtureTrainer

# Read by OpenMP when torch is loaded, and yours wins: threads that spin while they wait take the cores from each other
# where the machine is shared, and make it three to five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

__all__ = [
    "CopyOf",
    "MixtureConfig",
    "MixturePolicy",
    "MixtureTrainer",
    "__version__",
    "add_expert",
    "at_strength",
    "evaluate",
    "register_estep",
    "register_gate_term",
    "register_loss",
    "remove_expert",
    "replace_expert",
    "soup",
]

_HOME = {
    "CopyOf": "prefmix.policy.modular",
    "MixtureConfig": "prefmix.training.config",
    "MixturePolicy": "prefmix.policy.mixture_policy",
    "MixtureTrainer": "prefmix.training.trainer",
    "add_expert": "prefmix.policy.modular",
    "at_strength": "prefmix.policy.strength",
    "evaluate": "prefmix.evaluation.evaluator",
    "register_estep": "prefmix.training.extending",
    "register_gate_term": "prefmix.training.extending",
    "register_loss": "prefmix.training.extending",
    "remove_expert": "prefmix.policy.modular",
    "replace_expert": "prefmix.policy.modular",
    "soup": "prefmix.policy.modular",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
