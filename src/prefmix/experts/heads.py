"""K output heads: low-rank in hidden space, low-rank in logit space, full, or none (the base's own head for all).

All start as the reference itself: the correction is zero, every log-ratio and margin is exactly 0. Parameters are
float32 whatever the base's type.

Legend: B sequences, T completion tokens, N texts, K experts, D hidden, V vocabulary, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefmix.experts.interface import PackedStates
from prefmix.experts.output_head import OutputHead
from prefmix.kernels.frozen_head import frozen_head_log_probs
from prefmix.kernels.full_head import full_head_log_probs
from prefmix.kernels.low_rank_head import head_log_probs
from prefmix.kernels.next_token import base_logits, full_logits, low_rank_logits
from prefmix.kernels.texts import HeadLogProbs
from prefmix.kernels.up_projection import project_up

ALL, NONE = slice(None), slice(0, 0)
LogitFunction = Callable[[Float[Tensor, "B D"]], Float[Tensor, "B K V"]]


class AbstractHead(nn.Module, ABC):
    """K heads, each parameter stacked along a leading axis of length K."""

    @abstractmethod
    def log_probs(self, states: PackedStates, output: OutputHead, experts: slice = ALL) -> HeadLogProbs:
        """Sequence log-probabilities of every expert and of the base's own head, in nats.

        Args:
            states: states that all of these experts share.
            output: the base's output head.
            experts: which experts, by default all; an empty slice (`NONE`) gives the base alone.
        """

    @abstractmethod
    def logit_function(self, output: OutputHead, experts: list[int]) -> LogitFunction:
        """A function from states [B, D] to float32 next-token logits [B, K, V] of `experts`, in that order.

        What depends on parameters alone is computed here, once for all tokens of a generation.
        """

    def logits(self, hidden: Float[Tensor, "B D"], output: OutputHead, experts: list[int]) -> Float[Tensor, "B K V"]:
        """Float32 next-token logits of `experts`, in that order."""
        return self.logit_function(output, experts)(hidden)


class HiddenHead(AbstractHead):
    """W (h + U_k V_k h): few parameters, and the best on new texts (measured, see method.md 3b). The default.

    Attributes:
        down: [K, r, D] V_k, normal with variance 1/D, different for every expert.
        up: [K, D, r] U_k, zeros.
    """

    def __init__(self, output: OutputHead, num_experts: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        hidden = output.weight.shape[1]
        self.down = _random_down(num_experts, rank, hidden, output.weight.device, generator)
        self.up = nn.Parameter(torch.zeros(num_experts, hidden, rank, device=output.weight.device))

    def log_probs(self, states: PackedStates, output: OutputHead, experts: slice = ALL) -> HeadLogProbs:
        return _low_rank_log_probs(states, output, self.down[experts], project_up(output.weight, self.up[experts]))

    def logit_function(self, output: OutputHead, experts: list[int]) -> LogitFunction:
        up = project_up(output.weight, self.up[experts])
        return partial(_low_rank, output=output, down=self.down[experts], up=up)


class LogitHead(AbstractHead):
    """W h + B_k A_k h: free logits for every token; 40 times the parameters of `HiddenHead` at a large vocabulary.

    Attributes:
        down: [K, r, D] A_k, normal with variance 1/D, different for every expert.
        up: [K, V, r] B_k, zeros.
    """

    def __init__(self, output: OutputHead, num_experts: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        vocab, hidden = output.weight.shape
        self.down = _random_down(num_experts, rank, hidden, output.weight.device, generator)
        self.up = nn.Parameter(torch.zeros(num_experts, vocab, rank, device=output.weight.device))

    def log_probs(self, states: PackedStates, output: OutputHead, experts: slice = ALL) -> HeadLogProbs:
        return _low_rank_log_probs(states, output, self.down[experts], self.up[experts])

    def logit_function(self, output: OutputHead, experts: list[int]) -> LogitFunction:
        return partial(_low_rank, output=output, down=self.down[experts], up=self.up[experts])


class FullHead(AbstractHead):
    """W_k h: a whole output head for every expert; K = 1 is DPO with all but `lm_head` frozen.

    Attributes:
        weight: [K, V, D] W_k, copies of the base's head. The bias stays the base's.
    """

    def __init__(self, output: OutputHead, num_experts: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        copies = output.weight.detach().float()[None].expand(num_experts, -1, -1)
        self.weight = nn.Parameter(copies.clone(memory_format=torch.contiguous_format))

    def log_probs(self, states: PackedStates, output: OutputHead, experts: slice = ALL) -> HeadLogProbs:
        texts = (output.scaled(states.hidden), states.targets, states.segments, states.num_texts)
        return full_head_log_probs(*texts, output.weight, self.weight[experts], bias=output.bias)

    def logit_function(self, output: OutputHead, experts: list[int]) -> LogitFunction:
        return partial(_full, output=output, weights=self.weight, experts=experts)


class SharedHead(AbstractHead):
    """W h: the base's own head for every expert, for experts that differ in their states alone (LoRA branches)."""

    def __init__(self, output: OutputHead, num_experts: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.num_experts = num_experts

    def log_probs(self, states: PackedStates, output: OutputHead, experts: slice = ALL) -> HeadLogProbs:
        texts = (output.scaled(states.hidden), states.targets, states.segments, states.num_texts)
        log_probs = frozen_head_log_probs(*texts, output.weight, bias=output.bias)
        chosen = len(range(self.num_experts)[experts])
        return HeadLogProbs(log_probs[:, None].expand(-1, chosen), log_probs.detach())

    def logit_function(self, output: OutputHead, experts: list[int]) -> LogitFunction:
        return partial(_shared, output=output, num_experts=len(experts))


HEADS: dict[str, type[AbstractHead]] = {"hidden": HiddenHead, "logit": LogitHead, "full": FullHead, "none": SharedHead}


def _random_down(
    num_experts: int, rank: int, hidden: int, device: torch.device, generator: torch.Generator
) -> nn.Parameter:
    # Drawn on the CPU, so that a seed means the same start on every device.
    values = torch.randn(num_experts, rank, hidden, generator=generator) / hidden**0.5
    return nn.Parameter(values.to(device))


def _low_rank_log_probs(
    states: PackedStates, output: OutputHead, down: Float[Tensor, "k r D"], up: Float[Tensor, "k V r"]
) -> HeadLogProbs:
    texts = (output.scaled(states.hidden), states.targets, states.segments, states.num_texts)
    return head_log_probs(*texts, output.weight, down, up, bias=output.bias)


def _low_rank(hidden: Tensor, output: OutputHead, down: Tensor, up: Tensor) -> Tensor:
    return low_rank_logits(output.scaled(hidden), output.weight, output.bias, down, up)


def _full(hidden: Tensor, output: OutputHead, weights: Tensor, experts: list[int]) -> Tensor:
    # Indexed one by one: a stacked copy of whole heads would be as large as the model.
    chosen = [weights[k] for k in experts]
    return full_logits(output.scaled(hidden), output.weight, output.bias, chosen)


def _shared(hidden: Tensor, output: OutputHead, num_experts: int) -> Tensor:
    logits = base_logits(output.scaled(hidden), output.weight, output.bias)
    return logits[:, None].expand(-1, num_experts, -1)
