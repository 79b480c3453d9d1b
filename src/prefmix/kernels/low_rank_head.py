"""Log-probabilities of texts under K low-rank corrections of one frozen output head; [K, T, V] never exists.

Expert k's logits at a token with state h are z + (h A_k^T) B_k^T with z = W h + b, the base logits. The product W h is
the expensive part; it is computed once per token for the reference and all K experts.

Legend: T tokens, N texts, K experts, D hidden, V vocabulary, r rank.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.kernels.implementations import Implementation, choose
from prefmix.kernels.low_rank_problem import Demand
from prefmix.kernels.texts import HeadLogProbs, sum_by_text
from prefmix.kernels.tiles import Tiles, accumulation_dtype, default_tiles


def head_log_probs(
    hidden: Float[Tensor, "T D"],
    targets: Int[Tensor, "T"],
    segments: Int[Tensor, "T"],
    num_texts: int,
    base_weight: Float[Tensor, "V D"],
    down: Float[Tensor, "K r D"],
    up: Float[Tensor, "K V r"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    impl: Implementation = "auto",
    tiles: Tiles | None = None,
) -> HeadLogProbs:
    """Sequence log-probabilities of K low-rank heads and of the base head.

        logits_k = W h + b + B_k (A_k h),    log p_k(text) = sum_t logits_k[y_t] - logsumexp_v logits_k[v]

    The base product runs in the type of `base_weight`; corrections, softmax and sums in float32 (float64 where inputs
    are). Gradients flow to `down`, `up` and, where it requires one, `hidden`; not to the frozen base, and not through
    `base_log_probs`. With up = 0 the experts equal the base bit for bit.

    Args:
        hidden: [T, D] final states at the positions that predict the targets.
        targets: [T] token ids, 0..V-1.
        segments: [T] the text of each token, 0..N-1.
        num_texts: N.
        base_weight: [V, D] frozen output head W.
        down: [K, r, D] A_k. K = 0 computes the reference alone.
        up: [K, V, r] B_k. A head in hidden space, W (h + U_k A_k h), is B_k = W U_k.
        bias: [V] frozen bias b of the output head.
        impl: see `implementations`; "eager" materialises [K, T, V], for tests.
        tiles: size of a tile and how many base logits are kept for the backward; by default what was measured best for
            the device.

    Returns:
        `HeadLogProbs` in nats.

    Raises:
        ValueError: an implementation that this machine or these types do not have.

    Relations: `streamed_head.head_log_probs_and_grads` gives gradients at once and keeps the logits of few texts;
    `full_head.full_head_log_probs` for heads without low-rank structure.
    """
    accumulate = accumulation_dtype(torch.promote_types(hidden.dtype, down.dtype))
    tiles = default_tiles(hidden.device) if tiles is None else tiles
    token_log_probs = choose(impl, Demand(hidden.device, accumulate, base_weight.dtype, down.shape[1]))
    # Types are chosen here; a trainer's autocast must not put the corrections into 16 bits.
    with torch.autocast(hidden.device.type, enabled=False):
        low = torch.einsum("td,krd->ktr", hidden.to(accumulate), down.to(accumulate))
        tokens = token_log_probs(hidden, low, up.to(accumulate), base_weight, bias, targets, tiles)
        return sum_by_text(*tokens, segments, num_texts)
