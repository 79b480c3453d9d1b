"""Sequence log-probabilities of a whole model: trunk, then the output head at completion positions only.

Legend: N texts, T completion tokens, D hidden, V vocabulary, B sequences.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prefmix.experts.output_head import SCALES
from prefmix.experts.reading import Reading, run_reading
from prefmix.experts.trunk import run_trunk

# Logits of this many tokens exist at once, forward and backward: 1024 x 50,000 float32 are 200 MB.
_TOKENS = 1024


def text_log_probs_of(model: PreTrainedModel, reading: Reading) -> Float[Tensor, "N"]:
    """Log pi(y | x) of every text, float32, nats; carries the gradient to all of the model's weights.

        log pi(y | x) = sum_t log softmax(head(h_t))[y_t]

    Products run as the surroundings say (autocast included), softmax and sums in float32.

    Args:
        model: a causal language model whose logits `check_whole_model` found to be ours.
        reading: N texts, on the model's device.
    """
    states = run_reading(model, reading)
    pieces = [
        checkpoint(_token_log_probs, model, part, targets, use_reentrant=False)
        if torch.is_grad_enabled()
        else _token_log_probs(model, part, targets)
        for part, targets in zip(states.hidden.split(_TOKENS), states.targets.split(_TOKENS), strict=True)
    ]
    per_token = torch.cat(pieces)
    return per_token.new_zeros(states.num_texts).index_add(0, states.segments, per_token)


def next_token_logits(model: PreTrainedModel, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
    """Float32 logits from final-norm states, scaled and capped as the model's config says."""
    config = model.config.get_text_config()
    scale = 1.0
    for name, power in SCALES.items():
        value = getattr(config, name, None)
        scale *= float(value) ** power if value is not None else 1.0
    head = model.get_output_embeddings()
    logits = head(hidden if scale == 1.0 else hidden * scale).float()
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if not cap else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_whole_model(model: PreTrainedModel) -> None:
    """Compares our logits with the model's own.

    Raises:
        ValueError: there is no plain output head, or its logits are not made from the last hidden state as here.
    """
    if model.config.get_text_config().is_encoder_decoder or not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ValueError(f"{type(model).__name__}: no plain output head; use a decoder-only causal language model")
    tokens = torch.arange(4, device=model.get_output_embeddings().weight.device)[None]
    was_training = model.training
    model.eval()
    hidden = run_trunk(model, tokens, torch.ones_like(tokens), use_cache=False).last_hidden_state[0]
    theirs = model(input_ids=tokens, use_cache=False).logits[0].float()
    model.train(was_training)
    difference = (next_token_logits(model, hidden) - theirs).norm() / theirs.norm()
    if not difference <= (1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2):
        raise ValueError(
            f"{type(model).__name__}: its logits are not its output head applied to its last hidden state (relative "
            f"difference {difference:.1e}); use a model of another family"
        )


def _token_log_probs(
    model: PreTrainedModel, hidden: Float[Tensor, "T D"], targets: Int[Tensor, "T"]
) -> Float[Tensor, "T"]:
    logits = next_token_logits(model, hidden)
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
