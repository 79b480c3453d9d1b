"""Per-token log-probabilities summed into per-text ones; shared by all heads.

Legend: T tokens, N texts, K experts.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class HeadLogProbs(NamedTuple):
    """Sequence log-probabilities, in nats, summed over the tokens of each text.

    Attributes:
        log_probs: [N, K] sum_t log softmax(logits_k(h_t))[y_t].
        base_log_probs: [N] the same under the base head alone: the reference. Carries no gradient.
    """

    log_probs: Float[Tensor, "N K"]
    base_log_probs: Float[Tensor, "N"]


def sum_by_text(
    token_log_probs: Float[Tensor, "T K"],
    token_base: Float[Tensor, "T"],
    segments: Int[Tensor, "T"],
    num_texts: int,
) -> HeadLogProbs:
    """Adds up the tokens of each text; segments may come in any order, and a text without tokens has sum 0."""
    assert segments.shape == token_base.shape
    log_probs = token_log_probs.new_zeros(num_texts, token_log_probs.shape[1]).index_add(0, segments, token_log_probs)
    return HeadLogProbs(log_probs, sum_tokens(token_base, segments, num_texts))


def sum_tokens(tokens: Float[Tensor, "T"], segments: Int[Tensor, "T"], num_texts: int) -> Float[Tensor, "N"]:
    """Adds up the tokens of each text; 0 for a text without tokens, as token dropout may leave a short one."""
    assert segments.shape == tokens.shape
    return tokens.new_zeros(num_texts).index_add(0, segments, tokens)
