"""An expert as a PEFT adapter, so that anyone can load one expert alone.

The logits of expert k with a low-rank head are W h + W U_k V_k h (`head="hidden"`) or W h + U_k V_k h
(`head="logit"`), with V_k [r, D]. LoRA adds (alpha / r) B A h, so on `lm_head` A = V_k and B = (r / alpha) W U_k (or
U_k). LoRA branches, and a LoRA trunk that all experts share, are PEFT's own matrices already. The adapter is a copy for
others: this package reads `head.safetensors`. Whole heads and a trunk that trained whole are no adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prefmix.experts.branches import BranchedExperts
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.experts.smollm2 import loadable_source

PREFIX = "base_model.model"
HEAD = "lm_head"


def lora_matrices(
    head: str, state: Mapping[str, Tensor], base_weight: Float[Tensor, "V D"]
) -> tuple[Float[Tensor, "r D"], Float[Tensor, "V r"]] | None:
    """A and B of the LoRA update of `lm_head` (at scale 1) that equals a low-rank head; None for a full head."""
    if head == "hidden":
        up = (base_weight.float() @ state["up"].float().to(base_weight.device)).to("cpu")
    elif head == "logit":
        up = state["up"]
    else:
        return None
    return state["down"].detach().to("cpu", torch.float32), up.detach().to("cpu", torch.float32)


@torch.no_grad()
def write_adapter(experts: AbstractExperts, expert: int, folder: Path, base_source: str) -> bool:
    """Writes `adapter_config.json` and `adapter_model.safetensors` of one expert; false if it is no LoRA."""
    if isinstance(experts, BranchedExperts):
        return _write_branches(experts, expert, folder, base_source)
    if not isinstance(experts, SharedBaseExperts):
        return False
    matrices = lora_matrices(experts.describe()["head"], experts.expert_state(expert), experts.base_weight)
    if matrices is None:
        return False
    tensors = dict(zip((f"{HEAD}.lora_A.weight", f"{HEAD}.lora_B.weight"), matrices, strict=True))
    rank = len(matrices[0])
    _write(folder, tensors, {"r": rank, "lora_alpha": rank, "target_modules": [HEAD]}, base_source)
    return True


def _write_branches(experts: BranchedExperts, expert: int, folder: Path, base_source: str) -> bool:
    if experts.trunk_kind == "full" or experts.head_kind == "full":
        return False
    state = experts.expert_state(expert)
    head = {name.removeprefix("head."): state.pop(name) for name in list(state) if name.startswith("head.")}
    tensors = {name: value.float().to("cpu") for name, value in (state | experts.shared_state()).items()}
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    targets = sorted({_target(name) for name in names})
    matrices = lora_matrices(experts.head_kind, head, experts.output_head.weight)
    if matrices is not None:
        # PEFT scales every update alike; what the head's should not have is divided out.
        scale = experts.lora_alpha / experts.rank
        tensors |= {f"{HEAD}.lora_A.weight": matrices[0], f"{HEAD}.lora_B.weight": matrices[1] / scale}
        targets.append(HEAD)
    layers: dict[str, nn.Module] = dict(experts.base_model.named_modules())
    fields: dict[str, Any] = {"r": experts.rank, "lora_alpha": experts.lora_alpha, "target_modules": targets}
    if experts.branch_depth > 0 and not experts.trunk.trains:
        # A name that is given in full, such as lm_head, is not subject to this.
        fields["layers_to_transform"] = experts.branch_layers()
    fields["fan_in_fan_out"] = all(isinstance(layers[name], Conv1D) for name in names)
    _write(folder, tensors, fields, base_source)
    return True


def _target(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`; the full name where the last part is a mere number."""
    last = name.rpartition(".")[2]
    return name if last.isdigit() else last


def _write(folder: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], base_source: str) -> None:
    renamed = {f"{PREFIX}.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(renamed, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": loadable_source(base_source),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
    }
    text = json.dumps(dict(sorted((config | dict(fields)).items())), indent=2)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
