"""One expert of a policy for the world outside: as a PEFT adapter, or merged into a whole model.

Nothing is overwritten: an export goes to a folder that does not exist yet, and appears there complete or not at all.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefmix.experts.branches import BranchedExperts
from prefmix.experts.independent import IndependentExperts
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.low_rank_states import pairs
from prefmix.experts.quantization import quantization_of
from prefmix.experts.smollm2 import loadable_source
from prefmix.policy.adapters import write_adapter
from prefmix.policy.expert_files import can_be_found_again
from prefmix.policy.folder import fresh_folder
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.serialization import BASE_COPY

# What the tensors of an expert's own output head are called; a LoRA's end in lora_A.weight and lora_B.weight.
_HEAD = ("down", "up", "weight")


def export_adapter(policy: MixturePolicy, expert: int, folder: str | Path) -> None:
    """Writes expert k as a PEFT LoRA adapter with the tokenizer: `PeftModel.from_pretrained(base, folder)` is expert k.

    Args:
        policy: the policy.
        expert: k.
        folder: a folder that does not exist yet.

    Raises:
        ValueError: no such expert, one that is no low-rank update of the base, or the folder exists.
    """
    check_expert(policy, expert)
    with fresh_folder(Path(folder)) as place:
        put_adapter(policy, expert, place, absolute_place(base_place(policy)))
        policy.tokenizer.save_pretrained(str(place))


def export_merged(policy: MixturePolicy, expert: int, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes expert k as a whole model of its own with the tokenizer, which every server can load.

    A head that is tied to the input embeddings is untied first where the expert changes it: the embeddings must stay.

    Args:
        policy: the policy.
        expert: k.
        folder: a folder that does not exist yet.
        dtype: type of the written weights; None: the base's. Weights are merged in float32.

    Raises:
        ValueError: no such expert, or the folder exists.
    """
    check_expert(policy, expert)
    with fresh_folder(Path(folder)) as place:
        merged_model(policy.model.experts, expert, dtype).save_pretrained(str(place))
        policy.tokenizer.save_pretrained(str(place))


def merged_model(experts: AbstractExperts, expert: int, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Expert k as a whole model on the CPU; W (I + U V) is its output head for `head="hidden"`.

    Raises:
        ValueError: the base holds quantised weights, to which nothing can be added.
    """
    bits = quantization_of(experts.base_model)
    if bits is not None:
        raise ValueError(
            f"the base holds {bits} weights, to which an expert's update cannot be added; export adapters instead, and "
            "load them on the same base"
        )
    if isinstance(experts, IndependentExperts):
        model = copy.deepcopy(experts.expert_models[expert])
    else:
        model = _merged_with_base(experts, expert)
    return cast(PreTrainedModel, cast(Any, model).to("cpu", dtype or experts.base_model.dtype).eval())


def put_adapter(policy: MixturePolicy, expert: int, place: Path, base_name: str) -> None:
    """Writes the adapter of expert k into an existing folder.

    Raises:
        ValueError: the expert is no low-rank update of the base.
    """
    if not write_adapter(policy.model.experts, expert, place, base_name):
        kind = policy.model.experts.describe()
        raise ValueError(
            f"expert {expert} (kind {kind['kind']}, head {kind.get('head')}) is not a low-rank update of the base, so "
            "there is no adapter of it; use --format merged"
        )


def check_expert(policy: MixturePolicy, expert: int) -> None:
    """Raises ValueError where the policy has no expert k."""
    if not 0 <= expert < policy.config.num_experts:
        raise ValueError(f"expert={expert}: this policy has experts 0 to {policy.config.num_experts - 1}")


@torch.no_grad()
def _merged_with_base(experts: AbstractExperts, expert: int) -> PreTrainedModel:
    start = experts.base_model
    if isinstance(experts, BranchedExperts) and experts.trunk_kind == "full":
        start = experts.trunk.model
    model = cast(Any, copy.deepcopy(start)).cpu().float()
    model.requires_grad_(False)
    description = experts.describe()
    state = {name: value.float().cpu() for name, value in experts.expert_state(expert).items()}
    if description.get("trunk") == "lora":
        state |= {name: value.float().cpu() for name, value in experts.shared_state().items()}
    head = {name.removeprefix("head."): state.pop(name) for name in list(state) if name.removeprefix("head.") in _HEAD}
    if head:
        untie(model)
        weight = model.get_output_embeddings().weight.data
        weight.copy_(head["weight"] if "weight" in head else weight + _head_update(description["head"], head, weight))
    for down, up in pairs(state).items():
        layer = model.get_submodule(down.removesuffix(".lora_A.weight"))
        update = description["lora_alpha"] / description["rank"] * (state[up] @ state[down])
        layer.weight.data.add_(update.T if isinstance(layer, Conv1D) else update)
    return cast(PreTrainedModel, model)


def _head_update(kind: str, head: dict[str, Tensor], weight: Float[Tensor, "V D"]) -> Float[Tensor, "V D"]:
    update = head["up"] @ head["down"]
    return weight @ update if kind == "hidden" else update


def untie(model: PreTrainedModel) -> None:
    """Gives the output head weights of its own, in place, and says so in the config that will be saved."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head.weight is not embeddings.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, cast(Any, model.config).get_text_config()):
        config.tie_word_embeddings = False
    # transformers keeps the tied names that it found when the model was made, and would leave the head out of the file.
    cast(Any, model).all_tied_weights_keys = {}


def base_place(policy: MixturePolicy) -> str:
    """What `from_pretrained` takes for the base, from here: a hub name, a folder, or the copy in the policy's folder.

    "" where the policy, never saved, is the only one that holds the base.
    """
    source = loadable_source(policy.config.base_source)
    if can_be_found_again(source):
        return source
    copied = None if policy.path is None else policy.path / BASE_COPY
    return str(copied) if copied is not None and copied.is_dir() else ""


def absolute_place(place: str) -> str:
    """The same for a reader in any folder: folders in full, names on the hub as they are."""
    return os.path.abspath(place) if place and Path(place).exists() else place
