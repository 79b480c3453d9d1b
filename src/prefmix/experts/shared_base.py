"""K experts that share one frozen base model and differ in their output heads; the reference is the base itself.

The trunk runs once for all experts and the reference. `branch_depth` = 0 of the dial in docs/architecture.md. Experts
that leave the trunk earlier, or whose trunk trains, are `branches.BranchedExperts`; `build.py` chooses.

Legend: N texts, L padded length, T completion tokens, K experts, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prefmix.experts.head_decoder import HeadDecoder
from prefmix.experts.heads import HEADS
from prefmix.experts.interface import AbstractSharedBaseExperts, ExpertLogProbs, PackedStates, PaddedTexts
from prefmix.experts.output_head import OutputHead, find_output_head
from prefmix.experts.reading import run_reading
from prefmix.experts.text_reader import TextReader
from prefmix.experts.trunk import freeze


class SharedBaseExperts(AbstractSharedBaseExperts):
    """K output heads on one frozen trunk.

        log pi_k(y | x) = sum_t log softmax(head_k(h_t))[y_t],    log pi_ref(y | x) = the same with the base's head

    Attributes:
        base_model: the frozen base; it never trains and stays in evaluation mode.
        head: the K heads, the only parameters that train.
        num_experts: K.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        num_experts: int,
        head: str = "hidden",
        rank: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        """Freezes `base_model` in place and puts K untrained heads on it.

        Args:
            base_model: a causal language model.
            num_experts: K, at least 1.
            head: "hidden", "logit" or "full" (see `heads`).
            rank: r of a low-rank head; unused by "full".
            generator: CPU generator of the heads' random part; by default seeded with 0.

        Raises:
            ValueError: an unknown head, K or r below 1, or a base whose logits are not its output head's.
        """
        super().__init__()
        if head not in HEADS or head == "none":
            raise ValueError(f"head={head!r}: choose one of hidden, logit, full; experts on a frozen trunk need a head")
        if num_experts < 1 or rank < 1:
            raise ValueError(f"num_experts={num_experts}, expert_rank={rank}: both must be at least 1")
        output = find_output_head(base_model)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.num_experts, self.head_kind, self.rank = num_experts, head, rank
        self.base_model = freeze(base_model)
        self._reader = TextReader(base_model)
        self.head = HEADS[head](output, num_experts, rank, generator)

    @property
    def output_head(self) -> OutputHead:
        """The frozen head of the reference; read anew each time, since `.to(device)` replaces its tensors."""
        return find_output_head(self.base_model)

    @property
    def base_weight(self) -> Float[Tensor, "V D"]:
        """W, the weight of the reference's output head."""
        return self.output_head.weight

    def train(self, mode: bool = True) -> SharedBaseExperts:
        """Training mode for the heads alone: dropout in a frozen trunk would make the reference random."""
        super().train(mode)
        self.base_model.eval()
        return self

    @torch.no_grad()
    def trunk_states(self, texts: PaddedTexts) -> PackedStates:
        """Frozen states at the positions that predict completion tokens; no gradient."""
        return run_reading(self.base_model, self._reader.read(texts, self.prefix_sharing))

    def forward(
        self, texts: PackedStates | PaddedTexts, ref_log_probs: Float[Tensor, "N K"] | None = None
    ) -> ExpertLogProbs:
        """Log-probabilities of every text under every expert and the reference, float32, in nats.

        Args:
            texts: packed trunk states (from `trunk_cache`), or right-padded token ids, which run the trunk first.
            ref_log_probs: not read; the experts' own pass gives them again.
        """
        states = self.trunk_states(texts) if isinstance(texts, PaddedTexts) else texts
        result = self.head.log_probs(states, self.output_head)
        return ExpertLogProbs(result.log_probs, result.base_log_probs[:, None].expand(-1, self.num_experts))

    def decoder(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"], experts: list[int] | None = None
    ) -> HeadDecoder:
        """Starts decoding after left-padded prompts: one trunk pass and one KV cache for all experts."""
        chosen = list(range(self.num_experts)) if experts is None else list(experts)
        assert all(0 <= k < self.num_experts for k in chosen), chosen
        with torch.no_grad():
            logit_function = self.head.logit_function(self.output_head, chosen)
        return HeadDecoder(self.base_model, logit_function, input_ids, attention_mask)

    def expert_state(self, expert: int) -> dict[str, Tensor]:
        """The head of one expert, without the leading axis: down and up, or weight."""
        return {name: parameter[expert].detach().clone() for name, parameter in self.head.named_parameters()}

    @torch.no_grad()
    def load_expert_state(self, expert: int, state: dict[str, Tensor]) -> None:
        """Takes what `expert_state` gave.

        Raises:
            ValueError: other names or shapes, so the state belongs to another head, rank or base.
        """
        own = dict(self.head.named_parameters())
        found = {name: tuple(value.shape) for name, value in state.items()}
        expected = {name: tuple(parameter.shape[1:]) for name, parameter in own.items()}
        if found != expected:
            raise ValueError(
                f"expert {expert}: found tensors {found}, a {self.head_kind!r} head of rank {self.rank} on this base "
                f"has {expected}; use the head, expert_rank and base model that the expert was trained with"
            )
        for name, value in state.items():
            own[name][expert].copy_(value)

    def describe(self) -> dict[str, Any]:
        """JSON description for `build.build_experts`."""
        return {
            "kind": "shared_base",
            "branch_depth": 0,
            "num_experts": self.num_experts,
            "head": self.head_kind,
            "rank": self.rank,
        }
