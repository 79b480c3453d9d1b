"""Log-probabilities and gradients of K low-rank heads in one sweep over the texts, few of them at a time.

The coefficient of a pair in a mixture's gradient needs the K log-probabilities of that pair alone. So base logits of a
pair's texts are computed once; forward, coefficient and backward of all experts follow from the same tiles, and no more
logits are held than those of one panel of texts, whatever the batch.

Legend: T tokens, N texts, n texts of a panel, C tokens of a panel, B pairs, K experts, D hidden, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.kernels.implementations import Implementation, choose_passes
from prefmix.kernels.low_rank_problem import Demand, Gradients, Passes, Problem
from prefmix.kernels.low_rank_tokens import add_gradients, forward, kept_tokens
from prefmix.kernels.texts import HeadLogProbs, sum_by_text
from prefmix.kernels.tiles import Tiles, accumulation_dtype, default_tiles

# Which texts [n], and their log-probabilities [n, K] and [n] -> dLoss / dlogp [n, K].
Coefficient = Callable[[Int[Tensor, "n"], HeadLogProbs], Float[Tensor, "n K"]]

# Texts of one component are seen together; small components share a panel up to so many tokens.
_PANEL_TOKENS = 512


class HeadLogProbsAndGrads(NamedTuple):
    """Attributes:
    log_probs: [N, K] sum_t log softmax(logits_k(h_t))[y_t], nats.
    base_log_probs: [N] the same under the base head alone.
    grad_down: [K, r, D] sum_nk coefficient_nk dlogp_nk / dA.
    grad_up: [K, V, r] sum_nk coefficient_nk dlogp_nk / dB.
    grad_hidden: [T, D] sum_nk coefficient_nk dlogp_nk / dh, or None where it was not asked for.
    """

    log_probs: Float[Tensor, "N K"]
    base_log_probs: Float[Tensor, "N"]
    grad_down: Float[Tensor, "K r D"]
    grad_up: Float[Tensor, "K V r"]
    grad_hidden: Float[Tensor, "T D"] | None


@torch.no_grad()
def head_log_probs_and_grads(
    hidden: Float[Tensor, "T D"],
    targets: Int[Tensor, "T"],
    segments: Int[Tensor, "T"],
    num_texts: int,
    base_weight: Float[Tensor, "V D"],
    down: Float[Tensor, "K r D"],
    up: Float[Tensor, "K V r"],
    coefficient: Coefficient,
    *,
    components: Int[Tensor, "N"] | None = None,
    bias: Float[Tensor, "V"] | None = None,
    with_hidden: bool = False,
    impl: Implementation = "auto",
    tiles: Tiles | None = None,
) -> HeadLogProbsAndGrads:
    """`low_rank_head.head_log_probs` and the gradient of a loss that falls into parts, one for each component of texts.

        dLoss / dtheta = sum_nk coefficient_nk d log p_k(text n) / dtheta

    Args:
        hidden: [T, D] final states at the positions that predict the targets.
        targets: [T] token ids, 0..V-1.
        segments: [T] the text of each token, 0..N-1.
        num_texts: N.
        base_weight: [V, D] frozen output head W.
        down: [K, r, D] A_k.
        up: [K, V, r] B_k.
        coefficient: maps some texts [n] and their `HeadLogProbs` to dLoss / dlogp [n, K], with weights and the
            accumulation's denominator in it; called once with every text, whole components at a time.
        components: [N] texts with the same number are given to `coefficient` together, as `connected_texts` numbers
            them; None: all texts are.
        bias: [V] frozen bias b.
        with_hidden: whether the gradient to the states is wanted.
        impl: an implementation that works by tiles of base logits; see `implementations`.
        tiles: size of a tile; the logits of a component larger than `kept_bytes` are computed twice.

    Raises:
        ValueError: `impl` has no passes over tiles (triton, eager), or is not to be had.

    Relations: equal to `head_log_probs` and autograd with the same coefficients; nothing here is differentiable again.
    """
    accumulate = accumulation_dtype(torch.promote_types(hidden.dtype, down.dtype))
    tiles = default_tiles(hidden.device) if tiles is None else tiles
    passes = choose_passes(impl, Demand(hidden.device, accumulate, base_weight.dtype, down.shape[1]))
    with torch.autocast(hidden.device.type, enabled=False):
        low = torch.einsum("td,krd->ktr", hidden.to(accumulate), down.to(accumulate))
        problem = Problem(hidden.to(base_weight.dtype), low, up.to(accumulate), base_weight, bias, targets)
        stream = _Stream(problem, segments, num_texts, coefficient, tiles, passes, with_hidden)
        for tokens in _panels(segments, num_texts, components):
            stream.add(tokens)
        return stream.result(hidden, down, up)


class _Stream:
    """Values and accumulated gradients of the texts seen so far."""

    def __init__(
        self,
        problem: Problem,
        segments: Tensor,
        num_texts: int,
        coefficient: Coefficient,
        tiles: Tiles,
        passes: Passes,
        with_hidden: bool,
    ) -> None:
        self._problem, self._segments, self._coefficient = problem, segments, coefficient
        self._tiles, self._passes = tiles, passes
        self._grads = Gradients.zeros(problem, with_hidden, True, True)
        self._log_probs = problem.low.new_zeros(num_texts, len(problem.low))
        self._base = problem.low.new_zeros(num_texts)

    def add(self, panel: _Panel) -> None:
        """Forward, coefficient, backward of one panel; its logits are forgotten afterwards."""
        part = self._problem.rows(panel.tokens)
        keep = kept_tokens(part, self._tiles) == len(panel.tokens)
        log_probs, lse, plane = forward(part, self._tiles, self._passes, keep)
        place = torch.searchsorted(panel.texts, self._segments[panel.tokens])
        texts = sum_by_text(log_probs[1:].T, log_probs[0], place, len(panel.texts))
        self._log_probs[panel.texts], self._base[panel.texts] = texts
        grad = self._coefficient(panel.texts, texts).to(lse.dtype)[place].T.contiguous()
        grads = Gradients.zeros(part, self._grads.hidden is not None, True, False)._replace(up=self._grads.up)
        add_gradients(grads, grad, part, lse, plane, self._passes)
        assert self._grads.low is not None and grads.low is not None
        self._grads.low[:, panel.tokens] = grads.low
        if self._grads.hidden is not None and grads.hidden is not None:
            self._grads.hidden[panel.tokens] = grads.hidden

    def result(self, hidden: Tensor, down: Tensor, up: Tensor) -> HeadLogProbsAndGrads:
        """Everything, with the gradient through low = A h carried on to A and h."""
        low, grad_up, grad_hidden = self._grads.low, self._grads.up, self._grads.hidden
        assert low is not None and grad_up is not None
        grad_down = torch.einsum("ktr,td->krd", low, hidden.to(low.dtype)).to(down.dtype)
        if grad_hidden is not None:
            grad_hidden.add_(torch.einsum("ktr,krd->td", low, down.to(low.dtype)))
            grad_hidden = grad_hidden.to(hidden.dtype)
        grad_up = grad_up.transpose(1, 2).to(up.dtype)
        return HeadLogProbsAndGrads(self._log_probs, self._base, grad_down, grad_up, grad_hidden)


class _Panel(NamedTuple):
    """Attributes:
    texts: [n] ascending.
    tokens: [C] their tokens.
    """

    texts: Tensor
    tokens: Tensor


def _panels(segments: Int[Tensor, "T"], num_texts: int, components: Int[Tensor, "N"] | None) -> Iterator[_Panel]:
    """Whole components, small ones together."""
    if num_texts == 0:
        return
    components = torch.zeros(num_texts, dtype=torch.int64) if components is None else components.cpu()
    owner = components.to(segments.device)[segments]
    sizes = torch.bincount(owner, minlength=int(components.max()) + 1).tolist()
    panel_of, panel, filled = [], 0, 0
    for size in sizes:
        if filled and filled + size > _PANEL_TOKENS:
            panel, filled = panel + 1, 0
        filled += size
        panel_of.append(panel)
    panels = torch.tensor(panel_of)[components]
    of_token = panels.to(segments.device)[segments]
    for number in range(panel + 1):
        texts = (panels == number).nonzero().squeeze(1).to(segments.device)
        if len(texts):
            yield _Panel(texts, (of_token == number).nonzero().squeeze(1))


def connected_texts(chosen: Int[Tensor, "B"], rejected: Int[Tensor, "B"], num_texts: int) -> Int[Tensor, "N"]:
    """Numbers 0.. of the connected components of texts, where every pair joins its two texts.

    Args:
        chosen: [B] one text of each pair.
        rejected: [B] the other.
        num_texts: N; a text without pairs is a component of its own.
    """
    label = torch.arange(num_texts, device=chosen.device)
    while True:
        smaller = torch.minimum(label[chosen], label[rejected])
        new = label.clone()
        for text in (chosen, rejected):
            new.scatter_reduce_(0, text, smaller, "amin")
        new = torch.minimum(new, new[new])
        if torch.equal(new, label):
            return torch.unique(label, return_inverse=True)[1]
        label = new
