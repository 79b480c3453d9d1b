"""An expert with a low-rank head as a PEFT adapter on `lm_head`, so that anyone can load one expert alone.

The logits of expert k are W h + W U_k V_k h (`head="hidden"`) or W h + U_k V_k h (`head="logit"`), with V_k [r, D].
LoRA adds (alpha / r) B A h, so A = V_k, B = W U_k (or U_k) and alpha = r. The adapter is a copy for others: this
package reads `head.safetensors`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from prefmix.experts.interface import AbstractExperts
from prefmix.experts.shared_base import SharedBaseExperts

KEY = "base_model.model.lm_head"


def lora_matrices(
    head: str, state: dict[str, Tensor], base_weight: Float[Tensor, "V D"]
) -> tuple[Float[Tensor, "r D"], Float[Tensor, "V r"]] | None:
    """A and B of the LoRA update of `lm_head` that equals a low-rank head; None for a full head."""
    if head == "hidden":
        up = (base_weight.float() @ state["up"].float().to(base_weight.device)).to("cpu")
    elif head == "logit":
        up = state["up"]
    else:
        return None
    return state["down"].detach().to("cpu", torch.float32), up.detach().to("cpu", torch.float32)


def write_adapter(experts: AbstractExperts, expert: int, folder: Path, base_source: str) -> bool:
    """Writes `adapter_config.json` and `adapter_model.safetensors` of one expert; false if it has no low-rank head."""
    if not isinstance(experts, SharedBaseExperts):
        return False
    with torch.no_grad():
        matrices = lora_matrices(experts.describe()["head"], experts.expert_state(expert), experts.base_weight)
    if matrices is None:
        return False
    down, up = matrices
    tensors = {f"{KEY}.lora_A.weight": down.contiguous(), f"{KEY}.lora_B.weight": up.contiguous()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": base_source,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": len(down),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": len(down),
        "target_modules": ["lm_head"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return True
