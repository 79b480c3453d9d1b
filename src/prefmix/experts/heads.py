"""K output heads over one frozen trunk: low-rank in hidden space, low-rank in logit space, or full.

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
from prefmix.kernels.full_head import full_head_log_probs
from prefmix.kernels.low_rank_head import head_log_probs
from prefmix.kernels.next_token import full_logits, low_rank_logits
from prefmix.kernels.texts import HeadLogProbs
from prefmix.kernels.up_projection import project_up

LogitFunction = Callable[[Float[Tensor, "B D"]], Float[Tensor, "B K V"]]


class AbstractHead(nn.Module, ABC):
    """K heads, each parameter stacked along a leading axis of length K."""

    @abstractmethod
    def log_probs(self, states: PackedStates, output: OutputHead) -> HeadLogProbs:
        """Sequence log-probabilities of every expert and of the reference, in nats."""

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

    def log_probs(self, states: PackedStates, output: OutputHead) -> HeadLogProbs:
        up = project_up(output.weight, self.up)
        hidden = output.scaled(states.hidden)
        return head_log_probs(
            hidden, states.targets, states.segments, states.num_texts, output.weight, self.down, up, bias=output.bias
        )

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

    def log_probs(self, states: PackedStates, output: OutputHead) -> HeadLogProbs:
        hidden = output.scaled(states.hidden)
        return head_log_probs(
            hidden,
            states.targets,
            states.segments,
            states.num_texts,
            output.weight,
            self.down,
            self.up,
            bias=output.bias,
        )

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

    def log_probs(self, states: PackedStates, output: OutputHead) -> HeadLogProbs:
        hidden = output.scaled(states.hidden)
        return full_head_log_probs(
            hidden, states.targets, states.segments, states.num_texts, output.weight, self.weight, bias=output.bias
        )

    def logit_function(self, output: OutputHead, experts: list[int]) -> LogitFunction:
        return partial(_full, output=output, weights=self.weight, experts=experts)


HEADS: dict[str, type[AbstractHead]] = {"hidden": HiddenHead, "logit": LogitHead, "full": FullHead}


def _random_down(
    num_experts: int, rank: int, hidden: int, device: torch.device, generator: torch.Generator
) -> nn.Parameter:
    # Drawn on the CPU, so that a seed means the same start on every device.
    values = torch.randn(num_experts, rank, hidden, generator=generator) / hidden**0.5
    return nn.Parameter(values.to(device))


def _low_rank(hidden: Tensor, output: OutputHead, down: Tensor, up: Tensor) -> Tensor:
    return low_rank_logits(output.scaled(hidden), output.weight, output.bias, down, up)


def _full(hidden: Tensor, output: OutputHead, weights: Tensor, experts: list[int]) -> Tensor:
    # Indexed one by one: a stacked copy of whole heads would be as large as the model.
    chosen = [weights[k] for k in experts]
    return full_logits(output.scaled(hidden), output.weight, output.bias, chosen)
