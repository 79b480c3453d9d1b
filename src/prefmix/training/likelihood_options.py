"""Options that say how feedback is read and which loss follows, and what must hold between them. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from prefmix.mixture.likelihoods.model import PER_TOKEN, PROPER, FeedbackModel, LossType, Ties
from prefmix.training.noise_options import NoiseOptions, first_noise, noise_problems
from prefmix.training.robust_options import GroupRobustOptions, robust_problems

SMOOTHED: tuple[LossType, ...] = ("sigmoid", "sigmoid_norm", "robust", "simpo")


@dataclass
class LikelihoodOptions(NoiseOptions, GroupRobustOptions):
    """How a row's feedback becomes a log-likelihood under each expert (docs/theory.md has the equations)."""

    loss_type: LossType = field(
        default="sigmoid",
        metadata={
            "help": "TRL's name of the loss, here as -log p of a pair under an expert: sigmoid (Bradley-Terry), "
            "sigmoid_norm (rewards per token), hinge, ipo, robust, simpo (no reference, per token), or mixed_logit (a "
            "log-normal beta). Sigmoids and mixed_logit are likelihoods; with the others responsibilities are "
            "generalised posteriors."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "robust: the share of flipped labels under which the loss is unbiased; sigmoid, sigmoid_norm and "
            "simpo: labels are 1 - label_smoothing (conservative DPO). label_noise (in the logarithm) is a likelihood."
        },
    )
    simpo_gamma: float = field(
        default=0.5, metadata={"help": "simpo: the margin that it asks for, nats (TRL's default)."}
    )
    beta_spread: float = field(
        default=0.5,
        metadata={"help": "mixed_logit: standard deviation of log beta; the mean of beta stays beta. 0 is sigmoid."},
    )
    ties: Ties = field(
        default="drop",
        metadata={"help": "Rows with tie: true are left out and counted (drop), or modelled: davidson, rao_kupper."},
    )
    tie_strength: float = field(
        default=1.0,
        metadata={
            "help": "How often equal rewards tie: davidson's nu, share nu / (2 + nu); rao_kupper's eta, tanh(eta / 2). "
            "1: a third, or nearly half."
        },
    )
    likelihood: Literal["mbt", "bt_lse", "policy"] = field(
        default="mbt",
        metadata={
            "help": "Of the mixture: mbt mixes the experts' likelihoods and is what EM is for; bt_lse is Bradley-Terry "
            "on the mixture reward log sum_k w_k exp r_k; policy is DPO on the mixture policy. The last two follow the "
            "gradient of the marginal once the first responsibilities are no longer held."
        },
    )
    sft_weight: float = field(
        default=0.0,
        metadata={
            "help": "Adds this times -log pi_k of the preferred response per token, by responsibility (RPO's alpha): "
            "keeps what people prefer likely where DPO would lower both responses. 1 is the paper's choice, 0: none."
        },
    )
    dr_dpo_beta: float | None = field(
        default=None,
        metadata={
            "help": "Dr. DPO's beta': rows of a batch that fit badly, and may be wrong, teach less; 1 is the paper's "
            "choice, smaller is stronger, null: all rows teach alike."
        },
    )
    adaptive_beta: float | None = field(
        default=None,
        metadata={
            "help": "beta-DPO's alpha (the paper: 0.6): experts learn at beta_k [1 + alpha (M_k - M0_k)], M_k the mean "
            "margin of a pass at beta_k and M0_k its running mean, so a pass of large gaps holds them nearer to the "
            "reference. The E-step and the policy keep beta_k. null: beta stays."
        },
    )


def feedback_model(values: Mapping[str, Any]) -> FeedbackModel:
    """The observation model that a configuration asks for; where label noise is learnt, with the rate it starts at."""
    names = FeedbackModel.__dataclass_fields__
    chosen = {name: values[name] for name in names} | {"label_noise": first_noise(values)}
    if values["combine"] == "log_linear":
        chosen["likelihood"] = "log_linear"
    return FeedbackModel(**cast(Any, chosen))


def likelihood_problems(values: Mapping[str, Any]) -> list[str]:
    """Why these options do not go together, or with others, or nothing."""
    loss, smoothing = values["loss_type"], values["label_smoothing"]
    problems = _range_problems(values)
    if smoothing and loss not in SMOOTHED:
        problems.append(f"label_smoothing with loss_type={loss!r}: no effect there; use one of {', '.join(SMOOTHED)}")
    if loss == "robust" and not smoothing:
        problems.append(
            "loss_type='robust' with label_smoothing=0: that is 'sigmoid'; give the share of flipped labels"
        )
    if values["label_noise"] and (loss not in PROPER or smoothing):
        problems.append(
            f"label_noise with loss_type={loss!r}, label_smoothing={smoothing}: noise would be counted twice or not at "
            "all; use it with sigmoid, sigmoid_norm or mixed_logit alone"
        )
    if values["simpo_gamma"] != LikelihoodOptions.simpo_gamma and loss != "simpo":
        problems.append(f"simpo_gamma with loss_type={loss!r}: no effect there; use loss_type='simpo'")
    if values["beta_spread"] != LikelihoodOptions.beta_spread and loss != "mixed_logit":
        problems.append(f"beta_spread with loss_type={loss!r}: no effect there; use loss_type='mixed_logit'")
    if loss in PER_TOKEN and values["token_dropout"]:
        problems.append(f"token_dropout with loss_type={loss!r}: tokens left out would change its mean; use 0")
    if values["dr_dpo_beta"] is not None and values["latent"] == "membership":
        problems.append("dr_dpo_beta with latent='membership': its bound is one of users, not rows; leave it out")
    if values["sft_weight"] and values["m_step"] != "all":
        problems.append(
            f"sft_weight with m_step={values['m_step']!r}: it needs every expert's gradient; use m_step='all'"
        )
    return (
        problems
        + _tie_problems(values)
        + _marginal_problems(values)
        + _adaptive_problems(values)
        + noise_problems(values)
        + robust_problems(values)
    )


def _adaptive_problems(values: Mapping[str, Any]) -> list[str]:
    if values["adaptive_beta"] is None:
        return []
    fitting = (
        ("latent", values["latent"] != "membership", "its bound is one of users, not rows; use 'user' or 'pair'"),
        ("likelihood", values["likelihood"] == "mbt", "beta belongs to the mixture's one reward; use 'mbt'"),
        ("loss_type", values["loss_type"] != "ipo", "its target moves with beta; use another loss"),
    )
    return [f"adaptive_beta with {name}={values[name]!r}: {why}" for name, holds, why in fitting if not holds]


def _range_problems(values: Mapping[str, Any]) -> list[str]:
    robust, adaptive = values["dr_dpo_beta"], values["adaptive_beta"]
    checks = (
        ("label_smoothing", 0 <= values["label_smoothing"] < 0.5, "at least 0 and below 0.5"),
        ("simpo_gamma", 0 <= values["simpo_gamma"] < float("inf"), "zero or more nats"),
        ("beta_spread", 0 <= values["beta_spread"] < float("inf"), "zero or more, a standard deviation of log beta"),
        ("tie_strength", 0 < values["tie_strength"] < float("inf"), "positive; ties='drop' allows no ties"),
        ("sft_weight", 0 <= values["sft_weight"] < float("inf"), "zero or more; 0 leaves it out"),
        ("dr_dpo_beta", robust is None or 0 < robust < float("inf"), "positive, or null"),
        ("adaptive_beta", adaptive is None or 0 < adaptive < float("inf"), "positive, such as 0.6, or null"),
    )
    return [f"{name}={values[name]!r}: {remedy}" for name, holds, remedy in checks if not holds]


def _tie_problems(values: Mapping[str, Any]) -> list[str]:
    if values["ties"] == "drop":
        used = values["tie_strength"] != LikelihoodOptions.tie_strength
        return ["tie_strength with ties='drop': no effect there; use ties='davidson' or 'rao_kupper'"] if used else []
    problems = [
        f"{name} with ties={values['ties']!r}: flipped ties are not modelled; use one of the two"
        for name in ("label_noise", "label_smoothing")
        if values[name]
    ]
    if values["loss_type"] not in ("sigmoid", "sigmoid_norm"):
        problems.append(
            f"ties={values['ties']!r} with loss_type={values['loss_type']!r}: ties have a probability under sigmoid "
            "and sigmoid_norm only; use one of them, or ties='drop'"
        )
    return problems


def _marginal_problems(values: Mapping[str, Any]) -> list[str]:
    """`bt_lse` and `policy` are one scalar reward: gradients on the marginal, nothing of EM."""
    name = values["likelihood"]
    if name == "mbt":
        return []
    fitting = (
        ("latent", "pair", "their weights depend on the experts, so a user's rows have no closed form; use 'pair'"),
        ("loss_type", "sigmoid", "they are Bradley-Terry on the mixture's reward; use 'sigmoid'"),
        ("label_smoothing", 0.0, "leave it at 0 (label_noise works)"),
        ("ties", "drop", "ties are modelled under likelihood='mbt' only"),
        ("estep", "exact", "there is no E-step after the first responsibilities; use 'exact'"),
        ("m_step", "all", "every expert is part of the marginal; use 'all'"),
        ("dr_dpo_beta", None, "it reweights the rows of the bound; leave it out"),
    )
    problems = [
        f"{key}={values[key]!r} with likelihood={name!r}: {why}" for key, good, why in fitting if values[key] != good
    ]
    gate = list(values["gate"])
    if gate == ["global"] and values["gate_update"] == "closed_form":
        problems.append(
            f"gate_update='closed_form' with likelihood={name!r}: EM's closed form does not maximise it; use 'gradient'"
        )
    if "user" in gate:
        problems.append(f"gate={gate} with likelihood={name!r}: rows of users end at a MAP of mbt; drop 'user'")
    beta = values["beta"]
    if name == "policy" and isinstance(beta, list | tuple) and len(set(beta)) > 1:
        problems.append(f"beta={list(beta)} with likelihood='policy': there is one policy; give one number")
    return problems
