"""A trained mixture with an expert added, removed or replaced, or melted into one model. Nothing is trained.

All functions are pure: they return a new policy and leave the given one as it is. The base model (and, for independent
experts, every unchanged model) is shared between the two, not copied.

What is known of users. A new expert has never met a user's comparisons, so its evidence is missing.
    - `rows` given: for every user who stands in them, the evidence of *all* experts is computed afresh from these rows,
      which are taken as everything that is known of that user. Users who are new are added.
    - otherwise: neutral. Under `latent="user"` the new expert gets log sum_k w_k exp(evidence_k), the evidence that the
      user's comparisons have under the mixture of the others, so that its posterior weight for that user is the gate's
      weight of it, and the others keep their proportions (exact for a global gate; where the gate reads metadata, w is
      taken at average metadata). Under `pair` with a `user` term every user gives the new expert the gate's share.
Removing an expert drops its evidence; the posterior over the others is what Bayes' rule gives without it.

Legend: K experts, U users, B comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefmix.experts.adapter_files import adapter_state, is_adapter
from prefmix.experts.base_model import load_base
from prefmix.experts.independent import IndependentExperts
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.low_rank_states import State, perturbed
from prefmix.experts.recombine import copied_model, souped, with_models, with_states
from prefmix.mixture.gate_columns import narrowed, widened
from prefmix.mixture.gates import Gate
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.user_state import UserState

Row = Mapping[str, Any]


class CopyOf(NamedTuple):
    """Expert k of the same policy, moved a little so that training can part the two.

    Attributes:
        expert: k.
        scale: size of the noise, relative to the root mean square of each tensor; 0 is an exact copy.
        seed: of the noise.
    """

    expert: int
    scale: float = 0.01
    seed: int = 0


Source = CopyOf | Mapping[str, Tensor] | str | Path | PreTrainedModel


def add_expert(
    policy: MixturePolicy,
    expert: Source,
    *,
    weight: float | None = None,
    beta: float | None = None,
    rows: Sequence[Row] | None = None,
) -> MixturePolicy:
    """The policy with one more expert, the last.

    The gate gives it `weight` and multiplies every other weight by 1 - weight (`gate_columns.widened` says where
    exactly). Over a shared base the rank grows to the new expert's, if that is larger; others compute what they did.

    Args:
        policy: K experts.
        expert: `CopyOf` an expert; a state from `expert_state`; the folder of a PEFT adapter over the same base (its
            `lm_head` for heads; every layer that a branch has for branches). For independent experts: a model, or the
            folder or name of one; its reference is the base.
        weight: share of the new expert, above 0 and below 1; by default 1 / (K + 1).
        beta: of the new expert; by default the copied expert's, or the one that all experts have.
        rows: comparisons with users, from which evidence is computed; see the top of this module.

    Raises:
        ValueError: an expert that does not fit, a weight that is no share, or betas that differ.
    """
    _check_source(policy, expert)
    experts, config = policy.model.experts, policy.config
    count = experts.num_experts
    gate = widened(policy.model.gate, 1 / (count + 1) if weight is None else weight)
    new_experts = _recombined(experts, [*range(count), expert])
    users = _with_neutral(policy, count)
    change = f"added expert {count}: {_name(expert)}"
    new = _changed(policy, new_experts, gate, (*config.beta, _beta(policy, expert, beta)), users, change)
    return _with_evidence(new, rows)


def remove_expert(policy: MixturePolicy, expert: int) -> MixturePolicy:
    """The policy without expert k; later experts move up, and all weights are renormalised, exactly.

    Raises:
        ValueError: no such expert, or the only one.
    """
    _check_expert(policy, expert)
    count = policy.config.num_experts
    if count == 1:
        raise ValueError("remove_expert: this is the only expert")
    kept = [k for k in range(count) if k != expert]
    users = UserState(list(policy.users.names), policy.users.log_lik[:, kept], policy.users.count.clone())
    users.noise = policy.users.noise
    experts, gate = _recombined(policy.model.experts, kept), narrowed(policy.model.gate, expert)
    betas = tuple(policy.config.beta[k] for k in kept)
    return _changed(policy, experts, gate, betas, users, f"removed expert {expert}")


def replace_expert(
    policy: MixturePolicy,
    expert: int,
    new: Source,
    *,
    beta: float | None = None,
    rows: Sequence[Row] | None = None,
) -> MixturePolicy:
    """The policy with another expert k; the gate keeps every weight, the evidence of k is forgotten.

    Args:
        policy: K experts.
        expert: k.
        new: as for `add_expert`; `CopyOf` names experts of the given policy.
        beta: of the new expert, by default that of the old one.
        rows: as for `add_expert`.

    Raises:
        ValueError: no such expert, or one that does not fit.
    """
    _check_expert(policy, expert)
    _check_source(policy, new)
    order: list[int | Source] = list(range(policy.config.num_experts))
    order[expert] = new
    users = _with_neutral(policy, expert)
    betas = list(policy.config.beta)
    betas[expert] = betas[expert] if beta is None else beta
    experts = _recombined(policy.model.experts, order)
    gate = Gate(**policy.model.gate.describe()).to(policy.model.gate.population_log_weights().device)
    gate.load_state_dict(policy.model.gate.state_dict())
    change = f"replaced expert {expert}: {_name(new)}"
    return _with_evidence(_changed(policy, experts, gate, tuple(betas), users, change), rows)


def soup(policy: MixturePolicy, weights: Sequence[float] | None = None) -> MixturePolicy:
    """A weight soup: ONE model whose parameters are the weighted mean of the experts'. This is not the mixture.

        theta = sum_k w_k theta_k,     while the mixture is sum_k w_k pi_k(y | x)

    It costs one model to run, has no users and no gate, and may be better or worse than any expert: evaluate it. Over a
    shared base what is averaged is the effect on each layer, so its rank is K r; beta is the mean of the betas.

    Args:
        policy: K experts; independent ones must have equal shapes.
        weights: K weights, none negative, not all zero; by default the population's.

    Raises:
        ValueError: weights or experts that cannot be averaged.
    """
    given = policy.gate_weights() if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if given.shape != (policy.config.num_experts,) or not (given >= 0).all() or not 0 < given.sum() < torch.inf:
        raise ValueError(
            f"weights={given.tolist()}: give {policy.config.num_experts} numbers, none negative, not all 0"
        )
    shares = (given / given.sum()).tolist()
    experts = souped(policy.model.experts, shares)
    beta = sum(share * beta for share, beta in zip(shares, policy.config.beta, strict=True))
    change = f"weight soup of {policy.config.num_experts} experts (not their mixture), weights {shares}"
    return _changed(policy, experts, Gate(1, ("global",)), (beta,), UserState.empty(1), change)


# --- parts ------------------------------------------------------------------------------------------------------------


def _check_source(policy: MixturePolicy, source: Source) -> None:
    if isinstance(source, CopyOf):
        _check_expert(policy, source.expert)


def _recombined(experts: AbstractExperts, order: Sequence[int | Source]) -> AbstractExperts:
    """Experts in a new order: numbers are old experts, everything else a new one."""
    if isinstance(experts, IndependentExperts):
        models = [experts.expert_models[item] if isinstance(item, int) else _model(experts, item) for item in order]
        return with_models(experts, models, [_reference_of(item) for item in order])
    return with_states(experts, [experts.expert_state(e) if isinstance(e, int) else _state(experts, e) for e in order])


def _state(experts: AbstractExperts, source: Source) -> State:
    if isinstance(source, CopyOf):
        return perturbed(experts.expert_state(source.expert), source.scale, source.seed)
    if isinstance(source, Mapping):
        return source
    if isinstance(source, str | Path) and is_adapter(source):
        return adapter_state(experts, source)
    raise ValueError(
        f"expert={source!r}: no PEFT adapter there; over a shared base give an adapter folder, a state, or CopyOf(k)"
    )


def _model(experts: IndependentExperts, source: Source) -> PreTrainedModel:
    if isinstance(source, CopyOf):
        model = copied_model(experts, source.expert)
        noisy = perturbed(dict(model.named_parameters()), source.scale, source.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(noisy[name])
        return model
    if isinstance(source, PreTrainedModel):
        return source
    if isinstance(source, str | Path) and not is_adapter(source):
        return load_base(source, dtype=experts.base_model.dtype).model
    raise ValueError(
        f"expert={type(source).__name__}: independent experts are whole models; give a model, its folder or name, or "
        "CopyOf(k); `prefmix export --format merged` makes a model of an adapter"
    )


def _reference_of(item: int | Source) -> int | None:
    """Whose reference a model of the new order has: its own, the copied expert's, or (None) the base."""
    return item if isinstance(item, int) else item.expert if isinstance(item, CopyOf) else None


def _beta(policy: MixturePolicy, source: Source, beta: float | None) -> float:
    if beta is not None:
        return beta
    if isinstance(source, CopyOf):
        return policy.config.beta[source.expert]
    if len(set(policy.config.beta)) > 1:
        raise ValueError(f"beta=None: the experts have different betas {list(policy.config.beta)}; give the new one's")
    return policy.config.beta[0]


def _with_neutral(policy: MixturePolicy, column: int) -> UserState:
    """User state whose column k is neutral: the evidence of the others' mixture; k = K appends a column."""
    users, others = policy.users, [k for k in range(policy.config.num_experts) if k != column]
    log_weights = torch.log_softmax(policy.gate_weights().double().log()[others], dim=0)
    neutral = torch.logsumexp(log_weights + users.log_lik[:, others], dim=1)
    neutral = neutral if others else torch.zeros_like(neutral)
    log_lik = torch.cat([users.log_lik[:, :column], neutral[:, None], users.log_lik[:, column + 1 :]], dim=1)
    return UserState(list(users.names), log_lik, users.count.clone(), noise=users.noise)


def _with_evidence(policy: MixturePolicy, rows: Sequence[Row] | None) -> MixturePolicy:
    """Computes afresh what is known of every user of `rows`, under all experts."""
    by_user: dict[str, list[Row]] = {}
    for row in rows or ():
        if row.get("user") is not None:
            by_user.setdefault(str(row["user"]), []).append(row)
    for user, own in by_user.items():
        policy.adapt(user, own, anew=True)
    return policy


def _changed(
    policy: MixturePolicy,
    experts: AbstractExperts,
    gate: Gate,
    beta: tuple[float, ...],
    users: UserState,
    change: str,
) -> MixturePolicy:
    provenance = dict(policy.config.provenance)
    provenance["changes"] = [*provenance.get("changes", ()), change]
    # Weights of somebody unknown were of the experts before.
    parts: dict[str, Any] = {"experts": experts.describe(), "gate": gate.describe(), "unknown_users": {}}
    config = replace(policy.config, beta=beta, provenance=provenance, **parts)
    return MixturePolicy(MixtureModel(experts, gate), policy.tokenizer, config, users, policy.metadata_encoder)


def _check_expert(policy: MixturePolicy, expert: int) -> None:
    if policy.config.latent == "membership":
        raise ValueError(
            "latent='membership': where users stand was learned for these experts; train again with the others, or use "
            "latent='user'"
        )
    if not 0 <= expert < policy.config.num_experts:
        raise ValueError(f"expert={expert}: this policy has experts 0 to {policy.config.num_experts - 1}")


def _name(source: Source) -> str:
    if isinstance(source, CopyOf):
        return f"copy of expert {source.expert}, noise {source.scale:g}, seed {source.seed}"
    return str(source) if isinstance(source, str | Path) else f"a {type(source).__name__}"
