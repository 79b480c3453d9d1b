"""What can be compared: a name, a line about it, and the options that make it what it is. No torch here.

An arm is `MixtureConfig` options and a method, which says who trains it (`arm_methods.METHODS`). Legend: K experts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Method = Literal["trainer", "reference", "mixed_logit", "per_user", "soup", "probe", "low_rank_reward", "latent"]
# Trained by `MixtureTrainer`, so that its options (and a search over them) mean something.
TRAINED: tuple[Method, ...] = ("trainer", "mixed_logit", "per_user", "soup")
# Linear rewards on cached states: what is searched is the ridge.
LINEAR: tuple[Method, ...] = ("probe", "low_rank_reward", "latent")

# What a method reads beyond `MixtureConfig`: name -> (default, what it means).
SETTINGS: dict[Method, dict[str, tuple[Any, str]]] = {
    "per_user": {
        "shrinkage": (10.0, "pull of each user's expert to single DPO's, times the learning rate, after each step"),
        "max_users": (64, "users with an expert of their own, the most active ones; the others keep single DPO's"),
    },
    "probe": {"ridge": (None, "precision of the coefficients' prior; null: by cross-validation on training rows")},
    "latent": {"ridge": (1.0, "precision of the rewards' coefficients")},
    "low_rank_reward": {
        "ridge": (1.0, "precision of the basis rewards' coefficients"),
        "user_variance": (4.0, "prior variance of a user's logits over basis rewards"),
    },
}


@dataclass(frozen=True)
class Arm:
    """One model to train.

    Attributes:
        name: in tables and folder names.
        options: fields of `MixtureConfig` that make it what it is.
        true_groups: evaluated with the row's true group instead of a posterior (the oracle).
        method: who trains it.
        settings: what the method reads beyond `MixtureConfig`, see `SETTINGS`.
        about: one line.
        source: the paper it follows.
        needs_groups: rows must name true groups.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    true_groups: bool = False
    method: Method = "trainer"
    settings: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    source: str = ""
    needs_groups: bool = False

    def setting(self, name: str) -> Any:
        """A setting of the method, or its default."""
        return self.settings.get(name, SETTINGS[self.method][name][0])


def standard_arms(num_experts: int, num_groups: int | None) -> dict[str, Arm]:
    """Single DPO, the mixture, the mixture from a random start, and per-group DPO where true groups exist.

    Args:
        num_experts: K of the mixtures.
        num_groups: G, or None where rows name no group.
    """
    arms = [
        Arm("single DPO", {"num_experts": 1, "init": "random"}),
        Arm("mixture", {"num_experts": num_experts, "init": "probe"}),
        Arm("mixture, random start", {"num_experts": num_experts, "init": "random"}),
    ]
    if num_groups is not None:
        # Responsibilities stay at the true groups to the end: each expert is DPO on the rows of its group.
        oracle = {"num_experts": num_groups, "init": "labels", "init_hold_epochs": 1e6}
        arms.append(Arm("oracle", oracle, true_groups=True))
    return {arm.name: arm for arm in arms}


def all_arms(num_experts: int = 2, num_groups: int | None = None) -> dict[str, Arm]:
    """Every arm by the name that a comparison calls it, in the order of the table.

    Args:
        num_experts: K, of every arm that blends or chooses experts.
        num_groups: G, experts of the oracle; None stands for K where nothing is trained (a list of arms).
    """
    return _one_for_everybody() | _for_each_person(num_experts) | _mixtures(num_experts, num_groups or num_experts)


def _one_for_everybody() -> dict[str, Arm]:
    one = {"num_experts": 1, "init": "random"}
    return {
        "reference": Arm("reference", method="reference", about="the likelier response under the base model"),
        "single": Arm("single DPO", one, about="one expert for everybody", source="arXiv 2305.18290"),
        "robust": Arm(
            "robust DPO",
            {**one, "loss_type": "robust", "label_smoothing": 0.1},
            about="single DPO with the loss that is unbiased under 10% flipped labels",
            source="arXiv 2403.00409",
        ),
        "group_robust": Arm(
            "group-robust DPO",
            {**one, "robust_over": "group"},
            about="one expert for the worst group (group DRO); `robust_over: user` needs no true groups",
            source="arXiv 1911.08731, for DPO 2405.20304",
            needs_groups=True,
        ),
        "mixed_logit": Arm(
            "mixed-logit DPO",
            {**one, "loss_type": "mixed_logit"},
            method="mixed_logit",
            about="one expert under a log-normal beta whose spread is learnt",
            source="arXiv 2601.06180",
        ),
    }


def _for_each_person(num_experts: int) -> dict[str, Arm]:
    one, many = {"num_experts": 1, "init": "random"}, {"num_experts": num_experts}
    return {
        "per_user": Arm(
            "per-user DPO",
            one,
            method="per_user",
            about="an expert for each user, warm-started from single DPO and pulled to it",
        ),
        "hard_em": Arm(
            "hard EM",
            {**many, "init": "random", "estep": "hard"},
            about="each user wholly to one expert, random start",
            source="EM-DPO, arXiv 2510.15716",
        ),
        "hard_em_probe": Arm(
            "hard EM, probe",
            {**many, "init": "probe", "estep": "hard"},
            about="the same, started by the probe",
        ),
        "probe": Arm("probe", many, method="probe", about="K linear rewards on pooled states, no expert trained"),
        "low_rank_reward": Arm(
            "low-rank reward",
            many,
            method="low_rank_reward",
            about="each user weighs K linear rewards on pooled states (PAL, LoRe)",
            source="arXiv 2406.08469, 2504.14439",
        ),
        "vpl": Arm(
            "log-linear latent",
            many,
            method="latent",
            about="a Gaussian z for each user weighs K linear rewards on pooled states, margins summed (VPL)",
            source="arXiv 2408.10075",
        ),
    }


def _mixtures(num_experts: int, num_groups: int) -> dict[str, Arm]:
    many, blend = {"num_experts": num_experts}, {"latent": "membership", "init": "probe"}
    oracle = {"num_experts": num_groups, "init": "labels", "init_hold_epochs": 1e6}
    return {
        "soup": Arm(
            "weight soup",
            {**many, "init": "probe"},
            method="soup",
            about="one model: the mean of the mixture's experts, weighted by the gate",
            source="arXiv 2203.05482, for rewards 2306.04488",
        ),
        "mixture": Arm("mixture", {**many, "init": "probe"}, about="Mix-DPO, started by the probe (ours)"),
        "mixture_random": Arm(
            "mixture, random start",
            {**many, "init": "random"},
            about="Mix-DPO, random start",
            source="arXiv 2510.08256",
        ),
        "membership": Arm(
            "continuous groups",
            {**many, **blend},
            about="a Gaussian z for each user gives weights of a mixture (ours)",
        ),
        "oracle": Arm("oracle", oracle, true_groups=True, about="DPO for each true group", needs_groups=True),
    }


def with_options(base: Arm, name: str, given: Mapping[str, Any]) -> Arm:
    """An arm of the user's own: like another one, with other options or settings.

    Args:
        base: what it is like.
        name: what it is called.
        given: fields of `MixtureConfig`, or settings of the method.

    Raises:
        ValueError: a setting of another method.
    """
    foreign = {key: method for method, known in SETTINGS.items() for key in known if method != base.method}
    own = SETTINGS.get(base.method, {})
    wrong = [key for key in given if key in foreign and key not in own]
    if wrong:
        raise ValueError(f"{wrong[0]}: a setting of {foreign[wrong[0]]!r}, not of {base.method!r}; leave it out")
    options = {key: value for key, value in given.items() if key not in own}
    settings = {key: value for key, value in given.items() if key in own}
    robust_over = {**base.options, **options}.get("robust_over")
    needs_groups = robust_over == "group" or (base.needs_groups and "robust_over" not in base.options)
    return replace(
        base,
        name=name,
        options={**base.options, **options},
        settings={**base.settings, **settings},
        needs_groups=needs_groups,
    )


def setting_problems(arm: Arm) -> list[str]:
    """Why an arm's settings cannot be used, or nothing."""
    checks = {
        "shrinkage": (lambda value: value == 0 or _positive(value), "zero or more; 0 lets users part freely"),
        "max_users": (lambda value: isinstance(value, int) and value >= 1, "a whole number, at least 1"),
        "ridge": (lambda value: (value is None and arm.method == "probe") or _positive(value), "a positive number"),
        "user_variance": (lambda value: _positive(value), "a positive number"),
    }
    found = [(name, value, *checks[name]) for name, value in arm.settings.items()]
    return [f"{name}={value!r}: give {remedy}" for name, value, holds, remedy in found if not holds(value)]


def find_arm(name: str, arms: Mapping[str, Arm]) -> Arm:
    """The arm of a name.

    Raises:
        ValueError: no such arm, with the nearest one.
    """
    if name in arms:
        return arms[name]
    close = difflib.get_close_matches(name, list(arms), n=1)
    near = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown arm {name!r}{near}; `prefmix compare --list` names them all")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
