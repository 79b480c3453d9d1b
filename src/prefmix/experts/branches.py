"""K experts that leave one shared trunk n blocks below its end: LoRA branches, and a head each if wanted.

The dial `branch_depth` of docs/architecture.md for n >= 1 or all blocks (-1), and for n = 0 where the trunk trains.

Legend: N texts, L padded length, T completion tokens, K experts, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prefmix.experts.blocks import BranchPoint, TopBlocks, find_blocks, linear_layers
from prefmix.experts.branch_decoder import BranchDecoder, ExpertReader
from prefmix.experts.flat_attention import flat_attention
from prefmix.experts.head_decoder import HeadDecoder
from prefmix.experts.heads import HEADS, NONE
from prefmix.experts.interface import (
    AbstractExpertDecoder,
    AbstractSharedBaseExperts,
    ExpertLogProbs,
    PackedStates,
    PaddedTexts,
    without_rows,
)
from prefmix.experts.lora import LoraBank, LoraMatrices
from prefmix.experts.output_head import OutputHead, find_output_head
from prefmix.experts.reading import Reading, run_reading
from prefmix.experts.text_reader import TextReader
from prefmix.experts.trained_trunk import TRUNKS
from prefmix.experts.trunk import freeze

ALL_BLOCKS = -1


class _Look(NamedTuple):
    """What a look without gradient leaves for the pass that comes back: tokens, their layout, the trunk's states."""

    input_ids: Tensor
    reading: Reading
    point: BranchPoint | None


class BranchedExperts(AbstractSharedBaseExperts):
    """K experts, each with its own LoRA on every linear layer of the last n blocks.

        h^k = norm(blocks_k(g)),   g = trunk(x, y),   log pi_k(y | x) = sum_t log softmax(head_k(h^k_t))[y_t]

    The trunk below the branch runs once for all experts. Where it is frozen, the same pass goes on through the base's
    own blocks and gives the reference; a trained trunk needs a second pass for it, without gradient. At the start
    every B is zero, so every log-ratio and margin is exactly 0.

    Attributes:
        base_model: the frozen base, the reference; a trained trunk is a LoRA on it or a copy of it.
        trunk: what the experts share below the branch point (`trained_trunk`).
        keeps_activations: whether experts have blocks of their own.
        branches: the experts' LoRA, or None where n = 0.
        head: their output heads.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        num_experts: int,
        branch_depth: int,
        head: str = "none",
        rank: int = 16,
        lora_alpha: float | None = None,
        trunk: str = "frozen",
        generator: torch.Generator | None = None,
    ) -> None:
        """Freezes `base_model` in place and puts K untrained branches on it.

        Args:
            base_model: a causal language model.
            num_experts: K, at least 1.
            branch_depth: n, the number of blocks that each expert has for itself; -1: all (any architecture), 0: none.
            head: "none" (the base's), or "hidden", "logit"; "full" where n = 0.
            rank: r of every LoRA and of a low-rank head.
            lora_alpha: numerator of LoRA's scale alpha / r; by default 2 r.
            trunk: "frozen", "lora" or "full": what trains below the branch point.
            generator: CPU generator of the random parts; by default seeded with 0.

        Raises:
            ValueError: choices that do not go together, or an architecture that cannot be branched there.
        """
        super().__init__()
        _check_choices(num_experts, branch_depth, head, rank, trunk)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        alpha = float(2 * rank if lora_alpha is None else lora_alpha)
        self.num_experts, self.branch_depth, self.rank, self.lora_alpha = num_experts, branch_depth, rank, alpha
        self.head_kind, self.trunk_kind = head, trunk
        self.base_model = freeze(base_model)
        self.trunk = TRUNKS[trunk](base_model, branch_depth, rank, alpha, generator)
        model = self.trunk.model
        self._top = TopBlocks(model, branch_depth) if branch_depth > 0 else None
        self.branches: LoraBank | None = None
        if branch_depth:
            parts = [model.get_decoder()] if self._top is None else self._top.blocks
            self.branches = LoraBank(linear_layers(model, parts), num_experts, rank, alpha, generator)
        self.head = HEADS[head](self.output_head, num_experts, rank, generator)
        self.keeps_activations = self.branches is not None
        self._recomputes = False
        self._reader = TextReader(model)
        self._looked: _Look | None = None

    @property
    def output_head(self) -> OutputHead:
        """The base's frozen output head; read anew each time, since `.to(device)` replaces its tensors."""
        return find_output_head(self.base_model)

    def train(self, mode: bool = True) -> BranchedExperts:
        """Dropout of the model itself stays off: it would make reference and experts differ by chance."""
        super().train(mode)
        self.base_model.eval()
        self.trunk.model.eval()
        return self

    def forward(
        self, texts: PackedStates | PaddedTexts, ref_log_probs: Float[Tensor, "N K"] | None = None
    ) -> ExpertLogProbs:
        """Log-probabilities of every text under every expert and the reference, float32, in nats.

        Args:
            texts: right-padded token ids; packed final states say nothing about the blocks below.
            ref_log_probs: [N, K] of these texts, where they are known: the base's own pass is saved.
        """
        assert isinstance(texts, PaddedTexts), "experts with branches or a trained trunk read token ids"
        reading = self._reader.read(texts, self.prefix_sharing)
        point = self._branch_point(reading, with_reference=ref_log_probs is None)
        # A cheap M-step looks without gradient and comes back at once for the same texts (`for_learners`).
        looks = not torch.is_grad_enabled() and self.training and not self.trunk.trains
        self._looked = _Look(texts.input_ids, reading, point) if looks else None
        if ref_log_probs is None:
            ref_log_probs = self._reference_log_probs(reading, point)
        log_probs = self._shared_log_probs(reading) if self.branches is None else self._branch_log_probs(reading, point)
        return ExpertLogProbs(log_probs, ref_log_probs)

    @torch.no_grad()
    def reference_log_probs(self, texts: PackedStates | PaddedTexts) -> Float[Tensor, "N K"]:
        """The base alone reads the texts."""
        assert isinstance(texts, PaddedTexts), "experts with branches or a trained trunk read token ids"
        return self._reference_log_probs(self._reader.read(texts, self.prefix_sharing), None)

    def for_learners(self, texts: PackedStates | PaddedTexts, learners: Bool[Tensor, "N K"]) -> ExpertLogProbs:
        """Every expert's blocks and head read only the texts that it learns from; 0 stands for all others."""
        assert isinstance(texts, PaddedTexts), "experts with branches or a trained trunk read token ids"
        looked, self._looked = self._looked, None
        if looked is None or looked.input_ids is not texts.input_ids:
            reading = self._reader.read(texts, self.prefix_sharing)
            looked = _Look(texts.input_ids, reading, self._branch_point(reading) if self.branches is not None else None)
        if self.branches is None:
            log_probs = self._shared_log_probs(looked.reading)
        else:
            log_probs = self._branch_log_probs(looked.reading, looked.point, learners)
        return ExpertLogProbs(log_probs, torch.zeros_like(log_probs))

    def _branch_point(self, reading: Reading, with_reference: bool = False) -> BranchPoint | None:
        """One pass of the trunk, for the reference on through the base's own blocks where the trunk is frozen.

        None where no block stands above a trunk (n = 0 and n = all).
        """
        if self._top is None:
            return None
        gradient = torch.is_grad_enabled() and self.trunk.trains
        tokens = (reading.input_ids, reading.attention_mask)
        with self.trunk.applied(), flat_attention(self.trunk.model, reading.spans), torch.set_grad_enabled(gradient):
            through = with_reference and not self.trunk.trains
            return self._top.run_trunk(*tokens, through=through, **reading.options)

    @torch.no_grad()
    def _reference_log_probs(self, reading: Reading, point: BranchPoint | None) -> Float[Tensor, "N K"]:
        """From the branch point's own pass where it went through, else from a pass of the base."""
        if point is None or self._top is None or self.trunk.trains:
            states = run_reading(self.base_model, reading)
        else:
            states = self._packed(self._top, point.output, reading)
        base = self.head.log_probs(states, self.output_head, NONE).base_log_probs
        return base[:, None].expand(-1, self.num_experts)

    def _shared_log_probs(self, reading: Reading) -> Float[Tensor, "N K"]:
        """Where n = 0: all experts read the states of the trained trunk."""
        with self.trunk.applied():
            states = run_reading(self.trunk.model, reading)
        return self.head.log_probs(states, self.output_head).log_probs

    def _branch_log_probs(
        self, reading: Reading, point: BranchPoint | None, learners: Bool[Tensor, "N K"] | None = None
    ) -> Float[Tensor, "N K"]:
        """All texts under every expert, or those that it learns from and 0 for the others."""
        assert self.branches is not None
        columns = []
        for k, matrices in enumerate(self.branches.unbind()):
            rows = None if learners is None else learners[:, k].nonzero()[:, 0]
            if rows is None or len(rows) == reading.num_texts:
                columns.append(self._one_at_a_time(k, matrices, reading, point))
                continue
            column = torch.zeros(reading.num_texts, device=rows.device)
            if len(rows):
                part, kept = reading.select(rows)
                found = self._one_at_a_time(k, matrices, part, None if point is None else point.select(kept))
                column = column.to(found.dtype).index_put((rows,), found)
            columns.append(column)
        return torch.stack(columns, dim=1)

    def _one_at_a_time(self, *args: Any) -> Float[Tensor, "N"]:
        """`_expert_log_probs`, whose activations are computed again in the backward where that was asked for."""
        if self._recomputes and torch.is_grad_enabled():
            return checkpoint(self._expert_log_probs, *args, use_reentrant=False)
        return self._expert_log_probs(*args)

    def _expert_log_probs(
        self, expert: int, matrices: list[LoraMatrices], reading: Reading, point: BranchPoint | None
    ) -> Float[Tensor, "N"]:
        assert self.branches is not None
        with self.branches.applied(matrices):
            if point is not None and self._top is not None:
                with flat_attention(self.trunk.model, reading.spans):
                    hidden = self._top.replay(point)
                states = self._packed(self._top, hidden, reading)
            else:
                states = run_reading(self.base_model, reading)
        return self.head.log_probs(states, self.output_head, slice(expert, expert + 1)).log_probs[:, 0]

    @staticmethod
    def _packed(top: TopBlocks, hidden: Float[Tensor, "R M D"], reading: Reading) -> PackedStates:
        """Only completion positions go through the norm."""
        states = reading.completions(hidden)
        return states._replace(hidden=top.norm(states.hidden))

    def decoder(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"], experts: list[int] | None = None
    ) -> AbstractExpertDecoder:
        """Starts decoding after left-padded prompts: one trunk pass, and a KV cache for each expert's own blocks."""
        chosen = list(range(self.num_experts)) if experts is None else list(experts)
        assert all(0 <= k < self.num_experts for k in chosen), chosen
        output = self.output_head
        with torch.no_grad():
            if self.branches is None:
                function = self.head.logit_function(output, chosen)
                return HeadDecoder(self.trunk.model, function, input_ids, attention_mask, self.trunk.applied)
            matrices = self.branches.unbind()
            readers = [ExpertReader(matrices[k], self.head.logit_function(output, [k])) for k in chosen]
        return BranchDecoder(self.trunk, self._top, self.branches, readers, input_ids, attention_mask)

    def expert_state(self, expert: int) -> dict[str, Tensor]:
        """LoRA matrices under PEFT's names, and the parameters of the expert's head as `head.<name>`."""
        state = {} if self.branches is None else self.branches.state(expert)
        return state | {f"head.{name}": p[expert].detach().clone() for name, p in self.head.named_parameters()}

    @torch.no_grad()
    def load_expert_state(self, expert: int, state: dict[str, Tensor]) -> None:
        """Takes what `expert_state` gave.

        Raises:
            ValueError: other names or shapes, so the state belongs to another depth, rank, head or base.
        """
        expected = {name: tuple(value.shape) for name, value in self.expert_state(expert).items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if found != expected:
            differing = sorted(set(found.items()) ^ set(expected.items()))
            raise ValueError(
                f"expert {expert}: {len(differing)} tensors differ in name or shape, the first is {differing[0]}; use "
                "the branch_depth, head, expert_rank and base model that the expert was trained with"
            )
        if self.branches is not None:
            self.branches.load_state(expert, state)
        for name, parameter in self.head.named_parameters():
            parameter[expert].copy_(state[f"head.{name}"])

    def freeze_experts(self, experts: Sequence[int]) -> None:
        """Cuts the gradient of these experts' branches and heads, for good; a trained trunk trains on."""
        for module in (self.branches, self.head):
            for parameter in () if module is None else module.parameters():
                parameter.register_hook(partial(without_rows, rows=list(experts)))

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Holds the activations of one expert, and of one block of a trained trunk, at a time.

        Each branch, and each block of a trained trunk, is run again when the backward reaches it.
        """
        self._recomputes = True
        self.trunk.recompute()

    def shared_parameters(self) -> list[nn.Parameter]:
        """The trained trunk."""
        return [parameter for parameter in self.trunk.parameters() if parameter.requires_grad]

    def shared_state(self) -> dict[str, Tensor]:
        """The trained trunk: LoRA matrices under PEFT's names, or parameters under the model's."""
        return self.trunk.state()

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `shared_state` gave."""
        self.trunk.load_state(state)

    def branch_layers(self) -> list[int]:
        """Indices of the blocks that carry LoRA, the experts' or the trunk's."""
        count = len(find_blocks(self.base_model))
        lowest = 0 if self.trunk_kind == "lora" or self.branch_depth == ALL_BLOCKS else count - self.branch_depth
        return list(range(lowest, count))

    def describe(self) -> dict[str, Any]:
        """JSON description for `build.build_experts`."""
        return {
            "kind": "branched",
            "branch_depth": self.branch_depth,
            "num_experts": self.num_experts,
            "head": self.head_kind,
            "rank": self.rank,
            "lora_alpha": self.lora_alpha,
            "trunk": self.trunk_kind,
        }


def _check_choices(num_experts: int, branch_depth: int, head: str, rank: int, trunk: str) -> None:
    """The rules of `training/options.py`, for experts that are built without a configuration."""
    if head not in HEADS:
        raise ValueError(f"head={head!r}: choose one of {', '.join(HEADS)}")
    if trunk not in TRUNKS:
        raise ValueError(f"trunk={trunk!r}: choose one of {', '.join(TRUNKS)}")
    if num_experts < 1 or rank < 1:
        raise ValueError(f"num_experts={num_experts}, expert_rank={rank}: both must be at least 1")
    if branch_depth < ALL_BLOCKS:
        raise ValueError(f"branch_depth={branch_depth}: use -1 (all blocks), 0 (heads only) or a number of blocks")
    if branch_depth == 0 and head == "none":
        raise ValueError("head='none' with branch_depth=0: nothing would tell experts apart; choose a head or a depth")
    if branch_depth != 0 and head == "full":
        raise ValueError("head='full' with branches: K whole heads beside LoRA; use head='none', 'hidden' or 'logit'")
    if branch_depth == ALL_BLOCKS and trunk != "frozen":
        raise ValueError(
            f"trunk={trunk!r} with branch_depth=-1: no block is left below the experts; use trunk='frozen'"
        )
