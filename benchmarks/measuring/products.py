"""Multiplications and additions of the matrix products that a step needs, in GFLOP.

Counted is what the algorithm cannot do without: real tokens, causal halves of attention, each product once. What an
implementation does beyond that (padding, recomputed tiles, exponentials, the optimizer) lowers its share of the peak.

Legend: T completion tokens, D hidden, V vocabulary, K experts, r rank.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from measuring.texts import StepTokens
from prefmix.experts.lora import is_linear


class Products(NamedTuple):
    """GFLOP of one step of K low-rank heads in hidden space.

    Attributes:
        trunk: linear layers and attention of the frozen trunk; 0 where its states are cached.
        base: the base product W h, once for the reference, all experts, forward and backward.
        low_rank: corrections (h A^T) B^T, and the gradients of both factors.
        up: B = W U of every expert, and the gradient W^T G of U.
    """

    trunk: float
    base: float
    low_rank: float
    up: float

    def least_seconds(self, trunk_peak: float, head_peak: float) -> float:
        """CPU seconds at the peak: trunk and base product in the trunk's type, the rest in float32."""
        return (self.trunk + self.base) / trunk_peak + (self.low_rank + self.up) / head_peak


def head_products(
    model: PreTrainedModel, tokens: StepTokens, num_experts: int, rank: int, *, cached: bool, prompts_once: bool = False
) -> Products:
    """Products of one training step of K heads.

    Args:
        model: the base.
        tokens: what the step reads.
        num_experts: K.
        rank: r.
        cached: whether the trunk's states are read instead of computed.
        prompts_once: whether a prompt is read once for all its responses.
    """
    vocab, width = model.get_output_embeddings().weight.shape
    trunk = 0.0 if cached else trunk_products(model, tokens, prompts_once=prompts_once)
    return Products(
        trunk=trunk,
        base=2e-9 * tokens.completion * vocab * width,
        low_rank=2e-9 * num_experts * tokens.completion * rank * (3 * vocab + 2 * width),
        up=2e-9 * num_experts * vocab * width * rank * 2,
    )


def trunk_products(model: PreTrainedModel, tokens: StepTokens, *, prompts_once: bool = False) -> float:
    """GFLOP of one forward pass of the blocks over the step's real tokens."""
    read = tokens.once if prompts_once else tokens.real
    attended = tokens.once_pairs_of_positions if prompts_once else tokens.pairs_of_positions
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head * attended
    return 1e-9 * (2 * read * linear_weights(model.get_decoder()) + attention)


def linear_weights(trunk: nn.Module) -> int:
    """Weights of all linear layers of the trunk."""
    return sum(layer.weight.numel() for layer in trunk.modules() if is_linear(layer))
