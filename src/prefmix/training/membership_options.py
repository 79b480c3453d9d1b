"""Options of continuous groups (`latent="membership"`) and what must hold between them and others. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ENCODER_HIDDEN = 64


@dataclass
class MembershipOptions:
    """How users blend experts; read under `latent="membership"` only."""

    membership_dim: int | None = field(
        default=None,
        metadata={"help": "d, dimensions of a user's z; null: num_experts - 1, which can express every blend."},
    )
    membership_samples: int = field(
        default=16, metadata={"help": "S, draws of each z in a step, an even number: they come in pairs."}
    )
    membership_estep: Literal["per_user", "encoder"] = field(
        default="per_user",
        metadata={
            "help": "Where q(z) comes from: fitted to each user's comparisons, or read off them by an encoder that is "
            "trained along. An encoder gives new users theirs in one pass, and pays for it with a looser bound."
        },
    )
    kl_annealing: float = field(
        default=0.2,
        metadata={"help": "encoder: share of training over which the KL rises to its full weight; 0: full at once."},
    )
    free_bits: float = field(
        default=0.0,
        metadata={"help": "encoder: nats of each dimension that cost nothing, against q falling back to the prior."},
    )
    combine: Literal["mixture", "log_linear"] = field(
        default="mixture",
        metadata={
            "help": "What a blend is: one expert judges each comparison, drawn by the user's weights (mixture), or one "
            "reward does, the weighted sum of the experts' (log_linear: a product of experts, as in PAL, LoRe, VPL). "
            "A mixture can be sampled exactly; a product is written by decoder 'product', renormalised at each token."
        },
    )


def membership_problems(values: Mapping[str, Any]) -> list[str]:
    """Why the options of continuous groups do not go together, or with others, or nothing."""
    defaults = MembershipOptions()
    if values["latent"] != "membership":
        named = [name for name in vars(defaults) if values[name] != getattr(defaults, name)]
        return [f"{name} with latent={values['latent']!r}: use latent='membership'" for name in named]
    return _own_problems(values, defaults) + _foreign_problems(values) + _log_linear_problems(values)


def _own_problems(values: Mapping[str, Any], defaults: MembershipOptions) -> list[str]:
    dim, samples = values["membership_dim"], values["membership_samples"]
    checks = (
        ("membership_dim", dim is None or dim >= 1, "at least 1, or null; without dimensions use latent='pair'"),
        ("membership_samples", samples >= 2 and samples % 2 == 0, "an even number, at least 2"),
        ("kl_annealing", 0 <= values["kl_annealing"] <= 1, "a share of training, 0 to 1"),
        ("free_bits", 0 <= values["free_bits"] < float("inf"), "zero or more nats"),
    )
    problems = [f"{name}={values[name]!r}: {remedy}" for name, holds, remedy in checks if not holds]
    if values["membership_estep"] == "per_user":
        named = [name for name in ("kl_annealing", "free_bits") if values[name] != getattr(defaults, name)]
        problems += [f"{name} with membership_estep='per_user': no effect there; use 'encoder'" for name in named]
    if values["num_experts"] == 1:
        problems.append("latent='membership' with num_experts=1: there is nothing to blend; use latent='pair'")
    return problems


def _foreign_problems(values: Mapping[str, Any]) -> list[str]:
    """What continuous groups do not go together with."""
    problems = []
    for name, fitting, remedy in (
        ("estep", "exact", "responsibilities are the mean over q(z); use estep='exact'"),
        ("expert_parallel", False, "q(z) is shared over plain DDP alone; use expert_parallel=false"),
        ("sharding", "none", "q(z) is shared over plain DDP alone; use sharding='none'"),
    ):
        if values[name] != fitting:
            problems.append(f"{name}={values[name]!r} with latent='membership': {remedy}")
    if values["gate_update"] == "fixed":
        problems.append("gate_update='fixed' with latent='membership': its gate learns by gradient; leave it out")
    if "user" in values["gate"]:
        problems.append(
            f"gate={list(values['gate'])} with latent='membership': z is the user's own part; drop 'user' from the gate"
        )
    return problems


def _log_linear_problems(values: Mapping[str, Any]) -> list[str]:
    """What needs a likelihood of each expert's own: a summed margin is judged once, by Bradley-Terry."""
    if values["combine"] != "log_linear":
        return []
    fitting = (
        ("loss_type", "sigmoid", "the summed margin is one of Bradley-Terry; use 'sigmoid'"),
        ("label_smoothing", 0.0, "leave it at 0 (label_noise works)"),
        ("label_noise_update", "fixed", "rates are learnt from judgements of experts; give label_noise"),
        ("ties", "drop", "ties are modelled for each expert alone; use 'drop'"),
        ("likelihood", "mbt", "that is another way to one reward; leave it out"),
        ("m_step", "all", "every expert is part of the sum; use 'all'"),
    )
    problems = [
        f"{name}={values[name]!r} with combine='log_linear': {why}"
        for name, good, why in fitting
        if values[name] != good
    ]
    beta = values["beta"]
    if isinstance(beta, list | tuple) and len(set(beta)) > 1:
        problems.append(f"beta={list(beta)} with combine='log_linear': the product is one policy; give one number")
    return problems


def membership_dim(num_experts: int, dim: int | None) -> int:
    """What `membership_dim: null` stands for."""
    return num_experts - 1 if dim is None else dim
