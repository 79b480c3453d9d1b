"""The frozen output head of a base model: where its logits come from, or why this model is refused.

Legend: B sequences, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

# Config attribute -> how it acts on the scale of the logits (Cohere, Granite, Falcon-H1).
SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}
_NONLINEAR = ("final_logit_softcapping",)


class OutputHead(NamedTuple):
    """logits = W (scale h) + b.

    Attributes:
        weight: [V, D] W, in the model's type.
        bias: [V] b, or None.
        scale: what states are multiplied with before the head (1 for most models).
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None
    scale: float

    def scaled(self, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """States as the head reads them."""
        return hidden if self.scale == 1.0 else hidden * self.scale


def find_output_head(model: PreTrainedModel) -> OutputHead:
    """The output head of a causal language model.

    Raises:
        ValueError: its logits are not an affine function of the last hidden state, named by the attribute that says so.
    """
    config = model.config.get_text_config()
    for name in _NONLINEAR:
        if getattr(config, name, None):
            raise ValueError(
                f"{model.config.model_type}: {name}={getattr(config, name)} bends the logits after the output head, "
                "which experts that share a base do not support; use a base model without it"
            )
    if config.is_encoder_decoder:
        raise ValueError(f"{model.config.model_type}: is_encoder_decoder=True; use a decoder-only base model")
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"{type(model).__name__}: get_output_embeddings() gives {type(layer).__name__}, not a linear layer; "
            "use a causal language model with a plain output head (AutoModelForCausalLM)"
        )
    if not layer.weight.is_floating_point():
        raise ValueError(
            f"{type(model).__name__}: its output head holds {layer.weight.dtype} weights, which experts cannot read; "
            "quantise with load_in_8bit or load_in_4bit, which leave the head whole"
        )
    scale = 1.0
    for name, power in SCALES.items():
        value = getattr(config, name, None)
        scale *= float(value) ** power if value is not None else 1.0
    return OutputHead(layer.weight, layer.bias, scale)


@torch.no_grad()
def check_output_head(model: PreTrainedModel, hidden: Float[Tensor, "T D"], logits: Float[Tensor, "T V"]) -> None:
    """Compares our logits with the model's own, so that a base with another way to its logits is not trained on.

    Raises:
        ValueError: they differ by more than rounding.
    """
    head = find_output_head(model)
    ours = nn.functional.linear(head.scaled(hidden).to(head.weight.dtype), head.weight, head.bias)
    difference = (ours.float() - logits.float()).norm() / logits.float().norm()
    if not difference <= (1e-3 if logits.dtype in (torch.float32, torch.float64) else 5e-2):
        raise ValueError(
            f"{type(model).__name__}: its logits are not its output head applied to its last hidden state (relative "
            f"difference {difference:.1e}); use a base model of another family"
        )
