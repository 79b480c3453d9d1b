"""Experts and gate under one module: the module that the trainer optimizes and `accelerate` wraps."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prefmix.experts.interface import AbstractExperts, PackedStates, PaddedTexts
from prefmix.mixture.gates import Gate, GateInputs


class MixtureOutput(NamedTuple):
    """What the objective needs of one batch of B comparisons over N texts.

    Attributes:
        log_probs: [N, K] log pi_k(y | x), nats.
        ref_log_probs: [N, K] log pi_ref(k)(y | x), nats.
        log_weights: [B, K] log w_k(x, u, metadata).
    """

    log_probs: Float[Tensor, "N K"]
    ref_log_probs: Float[Tensor, "N K"]
    log_weights: Float[Tensor, "B K"]


class MixtureModel(nn.Module):
    """K experts and a gate.

    Batches are the dictionaries of `data.collator`; `hidden` (cached trunk states) and `input_ids` (token ids) are
    alternatives.
    """

    def __init__(self, experts: AbstractExperts, gate: Gate) -> None:
        super().__init__()
        self.experts = experts
        self.gate = gate

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """What `Trainer` calls for `gradient_checkpointing=True`."""
        self.experts.activation_checkpointing_enable(**options)

    def forward(
        self,
        *,
        text_ids: Int[Tensor, "N"],
        user: Int[Tensor, "B"],
        hidden: Float[Tensor, "T D"] | None = None,
        targets: Int[Tensor, "T"] | None = None,
        segments: Int[Tensor, "T"] | None = None,
        input_ids: Int[Tensor, "N L"] | None = None,
        attention_mask: Int[Tensor, "N L"] | None = None,
        completion_mask: Int[Tensor, "N L"] | None = None,
        prompt_states: Float[Tensor, "B D"] | None = None,
        metadata: Float[Tensor, "B M"] | None = None,
        learners: Bool[Tensor, "N K"] | None = None,
        ref_log_probs: Float[Tensor, "N K"] | None = None,
        log_probs: Float[Tensor, "N K"] | None = None,
        **_: Tensor,
    ) -> MixtureOutput:
        """Log-probabilities of the batch's distinct texts and the gate of its comparisons.

        With `learners`, log-probabilities are right and have a gradient only where an expert learns from a text, and
        the reference's are not to be read (`AbstractExperts.for_learners`). `ref_log_probs` [N, K] are those of the
        texts where they are known already (`AbstractExperts.forward`); with `log_probs` [N, K] too the experts are not
        run at all, and no gradient reaches them.
        """
        log_weights = self.gate(GateInputs(user=user, prompt_states=prompt_states, metadata=metadata))
        if log_probs is not None and ref_log_probs is not None:
            return MixtureOutput(log_probs, ref_log_probs, log_weights)
        texts: PackedStates | PaddedTexts
        if hidden is not None:
            assert targets is not None and segments is not None
            texts = PackedStates(hidden, targets, segments, len(text_ids))
        else:
            assert input_ids is not None and attention_mask is not None and completion_mask is not None
            texts = PaddedTexts(input_ids, attention_mask, completion_mask)
        found = self.experts(texts, ref_log_probs) if learners is None else self.experts.for_learners(texts, learners)
        return MixtureOutput(found.log_probs, found.ref_log_probs, log_weights)
