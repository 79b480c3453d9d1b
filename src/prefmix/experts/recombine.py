"""New experts from old ones: another number of them, other states, the same base and kind. Legend: K experts."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import PreTrainedModel

from prefmix.experts.build import build_experts
from prefmix.experts.independent import IndependentExperts
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.low_rank_states import State, averaged, padded, rank_of


def with_states(experts: AbstractExperts, states: Sequence[State]) -> AbstractExperts:
    """Experts over the same base with these states, in this order; their rank is the largest needed.

    Args:
        experts: over a shared base; not changed. The base and what experts share are taken over.
        states: K states of `expert_state`'s form; ranks may differ.

    Raises:
        ValueError: a state of another kind, head or base.
    """
    description = experts.describe() | {"num_experts": len(states)}
    old_rank = description["rank"]
    rank = max(old_rank, *(rank_of(state) for state in states))
    description["rank"] = rank
    if "lora_alpha" in description:
        description["lora_alpha"] *= rank / old_rank  # the scale alpha / r belongs to the states and stays
    new = build_experts(experts.base_model, description)
    new.load_shared_state(padded(experts.shared_state(), rank))
    for expert, state in enumerate(states):
        new.load_expert_state(expert, padded(state, rank, seed=expert))
    return new.train(experts.training)


def with_models(
    experts: IndependentExperts, models: Sequence[PreTrainedModel], keep: Sequence[int | None]
) -> AbstractExperts:
    """Independent experts with these models; entry k of `keep` says whose reference it has, None the base's."""
    references = [None if k is None else experts.references[k] for k in keep]
    places = [model.get_output_embeddings().weight.device for model in models]
    devices = None if experts.devices is None else places
    new = IndependentExperts(models, experts.base_model, references, devices=devices, autocast=experts.autocast)
    return new.train(experts.training)


def souped(experts: AbstractExperts, weights: Sequence[float]) -> AbstractExperts:
    """One expert whose parameters are the weighted mean of all experts' (of their effect on each layer, exactly).

    Raises:
        ValueError: whole models of different architectures have no mean.
    """
    if not isinstance(experts, IndependentExperts):
        return with_states(experts, [averaged([experts.expert_state(k) for k in range(experts.num_experts)], weights)])
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in experts.expert_models]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("soup: the experts are models of different shapes, whose parameters have no mean")
    model = copied_model(experts, 0)
    new = with_models(experts, [model], [0])
    new.load_expert_state(0, averaged([experts.expert_state(k) for k in range(experts.num_experts)], weights))
    return new


def copied_model(experts: IndependentExperts, expert: int) -> PreTrainedModel:
    """A model of its own with expert k's weights."""
    return copy.deepcopy(experts.expert_models[expert])
