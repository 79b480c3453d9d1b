"""What every kind of expert offers to training, scoring and decoding.

Legend: N texts, T completion tokens of all texts, K experts, D hidden size, V vocabulary, L padded length.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel


class PackedStates(NamedTuple):
    """Trunk states at the positions that predict completion tokens, texts one after another, no padding.

    Attributes:
        hidden: [T, D] final-norm trunk state at the position *before* each completion token.
        targets: [T] the completion token that each state predicts.
        segments: [T] which text (0..N-1, non-decreasing) each token belongs to.
        num_texts: N.
    """

    hidden: Float[Tensor, "T D"]
    targets: Int[Tensor, "T"]
    segments: Int[Tensor, "T"]
    num_texts: int


class PaddedTexts(NamedTuple):
    """Token ids of N texts, right-padded, as TRL's collator lays them out.

    Attributes:
        input_ids: [N, L] prompt then completion.
        attention_mask: [N, L] 1 on tokens, 0 on padding.
        completion_mask: [N, L] 1 on completion tokens.
    """

    input_ids: Int[Tensor, "N L"]
    attention_mask: Int[Tensor, "N L"]
    completion_mask: Int[Tensor, "N L"]


class ExpertLogProbs(NamedTuple):
    """Sequence log-probabilities, float32, in nats, summed over completion tokens.

    Attributes:
        log_probs: [N, K] log pi_k(y | x).
        ref_log_probs: [N, K] log pi_ref(k)(y | x); one column repeated where the reference is shared. No gradient.
    """

    log_probs: Float[Tensor, "N K"]
    ref_log_probs: Float[Tensor, "N K"]


class AbstractExpertDecoder(ABC):
    """Autoregressive state of K experts reading the same tokens: one per call of `AbstractExperts.decoder`."""

    @abstractmethod
    def logits(self) -> Float[Tensor, "B K V"]:
        """Float32 next-token logits of every expert after the tokens read so far."""

    @abstractmethod
    def append(self, tokens: Int[Tensor, "B"]) -> None:
        """Reads one more token of every sequence."""

    @abstractmethod
    def select(self, index: Int[Tensor, "M"]) -> None:
        """Keeps the sequences `index`, in that order (finished sequences leave the batch)."""


class AbstractExperts(nn.Module, ABC):
    """K policies over one tokenizer.

    Attributes:
        num_experts: K.
        base_model: a frozen model: what the gate and the probe read of prompts and texts, and the (shared) reference.
        keeps_activations: whether a pass with gradient keeps activations of all K experts. A cheap M-step then looks
            at all of them without gradient and comes back for those that learn (`for_learners`).
        prefix_sharing: whether token ids that several texts begin with are read once where the architecture allows.
    """

    num_experts: int
    base_model: PreTrainedModel
    keeps_activations: bool = False
    prefix_sharing: bool = True

    @abstractmethod
    def forward(
        self, texts: PackedStates | PaddedTexts, ref_log_probs: Float[Tensor, "N K"] | None = None
    ) -> ExpertLogProbs:
        """Log-probabilities of every text under every expert and its reference.

        Args:
            texts: N texts.
            ref_log_probs: [N, K] what `reference_log_probs` said of them before; given back as they are, and where the
                reference costs a pass of its own, that is saved. Heads on a frozen trunk get it with the experts' own.
        """

    @torch.no_grad()
    def reference_log_probs(self, texts: PackedStates | PaddedTexts) -> Float[Tensor, "N K"]:
        """Log pi_ref(k)(y | x) of every text, float32, nats; the experts are not run where they need not be."""
        return self(texts).ref_log_probs

    def for_learners(self, texts: PackedStates | PaddedTexts, learners: Bool[Tensor, "N K"]) -> ExpertLogProbs:
        """As `forward`, but right, and with a gradient, only where an expert learns from a text.

        Here everything is computed: the heads' backward pass skips what no gradient comes for.

        Args:
            texts: N texts.
            learners: [N, K] whether expert k learns from text n.

        Returns:
            As `forward`; nobody reads `ref_log_probs`, which the first look had.
        """
        return self(texts)

    @abstractmethod
    def decoder(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"], experts: list[int] | None = None
    ) -> AbstractExpertDecoder:
        """Starts decoding after left-padded prompts; `experts` restricts the K axis to those experts, in order."""

    @abstractmethod
    def expert_state(self, expert: int) -> dict[str, Tensor]:
        """The tensors that make expert k what it is, without the shared base."""

    @abstractmethod
    def load_expert_state(self, expert: int, state: dict[str, Tensor]) -> None:
        """Takes what `expert_state` gave."""

    def freeze_experts(self, experts: Sequence[int]) -> None:
        """Cuts the gradient of these experts, for good; the others train on.

        Here for experts whose parameters stand stacked, [K, ...]: their rows get a gradient of exactly zero. (What an
        optimizer does without a gradient, weight decay, is undone by the trainer.)
        """
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.shape[:1] == (self.num_experts,):
                parameter.register_hook(functools.partial(without_rows, rows=list(experts)))

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Keeps no activations of what trains, and recomputes them in the backward pass; nothing to do for heads."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON description from which an equal, untrained instance can be built (kind, head, rank, K)."""

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that all experts share (a trained trunk); they get a learning rate of their own."""
        return []

    def shared_state(self) -> dict[str, Tensor]:
        """Trained tensors that all experts share (a trained trunk); empty where only experts train."""
        return {}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `shared_state` gave."""
        assert not state, "these experts share no trained tensors"


class AbstractSharedBaseExperts(AbstractExperts):
    """Experts that grow from one frozen base model, which is the reference of all of them.

    Attributes:
        base_model: the frozen base; it never changes, whatever trains.
    """

    base_model: PreTrainedModel


def without_rows(gradient: Tensor, rows: list[int]) -> Tensor:
    """The gradient of stacked parameters, [K, ...], with zeros for the experts `rows`."""
    gradient = gradient.clone()
    gradient[rows] = 0.0
    return gradient
