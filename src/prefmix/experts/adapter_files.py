"""A PEFT LoRA adapter as the state of one of our experts.

An adapter may come from anywhere. Its updates are taken over exactly: what an expert of this kind cannot hold is
refused, and what the adapter does not touch starts as the base.

Legend: r rank, I inputs, O outputs, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from prefmix.experts.interface import AbstractExperts
from prefmix.experts.low_rank_states import pairs

_PREFIX = "base_model.model."
# What LoRA can have beside its two matrices, none of which an expert here has.
_REFUSED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")
# An update of a hidden-space head must be W U: this much of it may lie outside of W's columns (rounding).
_RESIDUAL = 1e-3


class Update(NamedTuple):
    """What an adapter adds to one layer: up down x, PEFT's scale included.

    Attributes:
        down: [r, I] A.
        up: [O, r] (alpha / r) B.
    """

    down: Float[Tensor, "r I"]
    up: Float[Tensor, "O r"]


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(folder) / "adapter_config.json").is_file()


def read_adapter(folder: str | Path, base_model: PreTrainedModel) -> dict[str, Update]:
    """Updates by the name of the layer in the model (`lm_head`, `model.layers.0.self_attn.q_proj`).

    PEFT stores the weights of an output head beside its update; they must be the base's.

    Raises:
        ValueError: no LoRA adapter, or one with parts that have no place in an expert.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(str(folder / "adapter_model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"adapter {folder}: {type(error).__name__} while reading it; give a folder that PEFT's "
            "save_pretrained wrote (adapter_config.json, adapter_model.safetensors)"
        ) from error
    scale = _scale(folder, config)
    updates = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix("lora_A.weight")
        layer = stem.removeprefix(_PREFIX).removesuffix(".")
        updates[layer] = Update(tensors.pop(name).float(), scale * tensors.pop(f"{stem}lora_B.weight").float())
    for name in [name for name in tensors if name.endswith(".base_layer.weight")]:
        own = cast(Any, base_model).get_submodule(name.removeprefix(_PREFIX).removesuffix(".base_layer.weight")).weight
        if own.shape != tensors[name].shape or not torch.allclose(own.cpu().float(), tensors[name].float(), rtol=1e-2):
            raise ValueError(f"adapter {folder}: {name} is not the base's; merge the adapter into a model")
        del tensors[name]
    if tensors or not updates:
        raise ValueError(
            f"adapter {folder}: tensors other than LoRA pairs ({sorted(tensors)[:3]}); merge it into a model"
        )
    return updates


@torch.no_grad()
def adapter_state(experts: AbstractExperts, folder: str | Path) -> dict[str, Tensor]:
    """The state of an expert that does what base plus adapter do; ranks are the adapter's own.

    Args:
        experts: whose kind, base and head the state is for; not changed.
        folder: a PEFT LoRA adapter over the same base.

    Raises:
        ValueError: the adapter changes layers that these experts share, or its output head cannot be written as theirs.
    """
    template, updates = experts.expert_state(0), read_adapter(folder, experts.base_model)
    scale = experts.describe().get("lora_alpha", 1.0) / experts.describe().get("rank", 1.0)
    state: dict[str, Tensor] = {}
    for down, up in pairs(template).items():
        if down.endswith(".lora_A.weight"):
            update = updates.pop(down.removesuffix(".lora_A.weight"), None)
            state |= _untouched(template, down, up) if update is None else {down: update.down, up: update.up / scale}
    state |= _head_state(experts, template, updates.pop(_output_name(experts.base_model), None), folder)
    if updates:
        raise ValueError(
            f"adapter {folder}: changes {len(updates)} layers that these experts share (first: {sorted(updates)[0]}); "
            "train with branch_depth=-1 (or deep enough for these layers), or merge the adapter and use "
            "expert_kind='independent'"
        )
    return {name: value.to(template[name].device, template[name].dtype) for name, value in state.items()}


def _head_state(
    experts: AbstractExperts, template: dict[str, Tensor], update: Update | None, folder: str | Path
) -> dict[str, Tensor]:
    kind = experts.describe()["head"]
    weight = experts.base_model.get_output_embeddings().weight
    prefix = "head." if any(name.startswith("head.") for name in template) else ""
    if kind == "none":
        if update is not None:
            raise ValueError(f"adapter {folder}: changes the output head, which head='none' shares; use head='logit'")
        return {}
    if kind == "full":
        delta = 0.0 if update is None else (update.up @ update.down).to(weight.device)
        return {f"{prefix}weight": weight.float() + delta}
    if update is None:
        return _untouched(template, f"{prefix}down", f"{prefix}up")
    up = _hidden_up(weight, update.up, folder) if kind == "hidden" else update.up
    return {f"{prefix}down": update.down, f"{prefix}up": up}


def _hidden_up(weight: Float[Tensor, "V D"], up: Float[Tensor, "V r"], folder: str | Path) -> Float[Tensor, "D r"]:
    """U with W U = B, for a hidden-space head; least squares in float64."""
    w, b = weight.detach().double().cpu(), up.double().cpu()
    solution = torch.linalg.lstsq(w.T @ w, w.T @ b, driver="gelsd").solution
    residual = (w @ solution - b).norm() / b.norm().clamp(min=1e-300)
    if residual > _RESIDUAL:
        raise ValueError(
            f"adapter {folder}: its update of the output head is not of the form W U V (relative residual "
            f"{residual:.1e}), which head='hidden' needs; use head='logit'"
        )
    return solution.float()


def _untouched(template: dict[str, Tensor], down: str, up: str) -> dict[str, Tensor]:
    return {down: template[down], up: torch.zeros_like(template[up])}


def _output_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _scale(folder: Path, config: dict[str, Any]) -> float:
    problems = [name for name in _REFUSED if config.get(name)]
    problems += [] if config.get("bias", "none") == "none" else ["bias"]
    if config.get("peft_type") != "LORA" or problems:
        found = ", ".join(problems) or f"peft_type={config.get('peft_type')!r}"
        raise ValueError(f"adapter {folder}: {found} has no place in an expert; merge the adapter into a model")
    rank = config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
