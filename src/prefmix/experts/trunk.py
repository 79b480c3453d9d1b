"""One pass of the frozen trunk: padded token ids in, states at the positions that predict completion tokens out.

Legend: N texts, L padded length, T completion tokens, D hidden.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from prefmix.experts.interface import PackedStates, PaddedTexts
from prefmix.experts.output_head import check_output_head


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Turns gradients and dropout off, in place, and checks that the model's logits come from its output head.

    Raises:
        ValueError: this model's logits cannot be shared by experts (see `output_head`).
    """
    model.requires_grad_(False)
    model.eval()
    device = model.get_output_embeddings().weight.device
    tokens = torch.arange(4, device=device)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0]
    check_output_head(model, trunk_states(model, tokens, torch.ones_like(tokens))[0], logits)
    return model


@torch.no_grad()
def trunk_states(
    model: PreTrainedModel, input_ids: Int[Tensor, "N L"], attention_mask: Int[Tensor, "N L"]
) -> Float[Tensor, "N L D"]:
    """Final-norm states at every position; padding may stand on either side."""
    return run_trunk(model, input_ids, attention_mask, use_cache=False).last_hidden_state


def run_trunk(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "N M"],
    attention_mask: Int[Tensor, "N L"],
    *,
    cache: Cache | None = None,
    **options: Any,
) -> Any:
    """The trunk's own output object for the last M of L positions; unless told, positions count tokens, not padding.

    With a `cache`, keys and values of the positions before these are read from it, and theirs are added.
    """
    trunk = model.get_decoder()
    takes = inspect.signature(trunk.forward).parameters
    if cache is not None:
        # Older transformers call it past_key_values, newer ones warn of that name.
        options |= {"cache" if "cache" in takes else "past_key_values": cache, "use_cache": True}
    if "position_ids" not in options and "position_ids" in takes:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)
        options["position_ids"] = positions[:, -input_ids.shape[1] :]
    return trunk(input_ids=input_ids, attention_mask=attention_mask, **options)


def pack_completions(states: Float[Tensor, "N L D"], texts: PaddedTexts) -> PackedStates:
    """Keeps the state before every completion token, texts one after another.

    With prompt tokens p, completion tokens c and one text [p0 p1 c0 c1], the states of p1 and c0 are kept, with targets
    c0 and c1. The first token of a text has no state before it, so a text with an empty prompt is scored from its
    second token on (as in TRL).
    """
    text, position = completion_places(texts)
    targets = texts.input_ids[text, position + 1]
    return PackedStates(states[text, position], targets, text, len(texts.input_ids))


class CompletionPlaces(NamedTuple):
    """Where the token before each completion token stands: its text and its position there, texts in order."""

    text: Int[Tensor, "T"]
    position: Int[Tensor, "T"]


def completion_places(texts: PaddedTexts) -> CompletionPlaces:
    """The places of the states that predict completion tokens."""
    return CompletionPlaces(*texts.completion_mask[:, 1:].nonzero(as_tuple=True))
