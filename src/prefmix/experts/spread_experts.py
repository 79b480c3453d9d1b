"""Independent experts that live on several processes: each holds its own, and all see everybody's log-probabilities.

Legend: N texts, K experts, W processes, M experts that this process holds, at most ceil(K / W).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prefmix.experts.independent import IndependentExperts
from prefmix.experts.interface import (
    AbstractExpertDecoder,
    AbstractExperts,
    ExpertLogProbs,
    PackedStates,
    PaddedTexts,
)


def experts_of_process(num_experts: int, processes: int, index: int) -> list[int]:
    """The experts that a process holds: expert k lives on process k mod W.

    Args:
        num_experts: K.
        processes: W.
        index: of the process, from 0.

    Raises:
        ValueError: there are more processes than experts.
    """
    if processes > num_experts:
        raise ValueError(
            f"expert_parallel=true with num_experts={num_experts} on {processes} processes: some would hold no expert; "
            f"start at most {num_experts} processes"
        )
    return list(range(index, num_experts, processes))


class SpreadExperts(AbstractExperts):
    """K whole models over W processes that read the same texts; expert k lives on process k mod W.

        log pi_k(y | x) and log pi_ref(k)(y | x) from its owner, [N, K] on every process

    Everything after the log-probabilities is computed by every process from the same numbers, the loss too. A
    gradient reaches the own columns alone, once: nothing is summed over processes. All processes must call `forward`
    and `for_learners` together, with the same texts.

    Attributes:
        own: the experts of this process, with their references.
        own_experts: [M] which of the K they are, in order.
        num_experts: K.
        base_model: the frozen base, which every process holds.
    """

    keeps_activations = True

    def __init__(self, own: IndependentExperts, num_experts: int, processes: int, index: int) -> None:
        """All processes must make theirs together.

        Args:
            own: the experts `experts_of_process(num_experts, processes, index)`.
            num_experts: K.
            processes: W; 1 needs no process group.
            index: of this process.
        """
        super().__init__()
        self.num_experts, self._processes, self._index = num_experts, processes, index
        self.own_experts = experts_of_process(num_experts, processes, index)
        assert len(self.own_experts) == own.num_experts, "one model for each expert of this process"
        self.base_model = own.base_model
        self.own = own
        self._description = self._described(own.describe())

    def forward(
        self, texts: PackedStates | PaddedTexts, ref_log_probs: Float[Tensor, "N K"] | None = None
    ) -> ExpertLogProbs:
        """Log-probabilities of every text under every expert and its reference; a gradient to the own columns."""
        known = None if ref_log_probs is None else ref_log_probs[:, self.own_experts]
        with self._own_draws():
            found = self.own(texts, known)
        return self._of_all(found.log_probs, found.ref_log_probs)

    def reference_log_probs(self, texts: PackedStates | PaddedTexts) -> Float[Tensor, "N K"]:
        """Each process runs the references of its experts; all must call it together."""
        own = self.own.reference_log_probs(texts)
        return self._of_all(own, own).ref_log_probs

    def for_learners(self, texts: PackedStates | PaddedTexts, learners: Bool[Tensor, "N K"]) -> ExpertLogProbs:
        """As `IndependentExperts.for_learners`, of which each process does its part."""
        with self._own_draws():
            found = self.own.for_learners(texts, learners[:, self.own_experts])
        return self._of_all(found.log_probs, found.ref_log_probs)

    def train(self, mode: bool = True) -> SpreadExperts:
        """Training mode for the experts alone."""
        super().train(mode)
        self.base_model.eval()
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recomputes the experts' blocks in the backward pass instead of keeping their activations."""
        self.own.activation_checkpointing_enable(**options)

    def freeze_experts(self, experts: Sequence[int]) -> None:
        """Those of them that live here get no gradient and no backward pass."""
        self.own.freeze_experts([self.own_experts.index(expert) for expert in experts if expert in self.own_experts])

    def own_model(self, expert: int) -> nn.Module:
        """The model of expert k, which must live here."""
        return self.own.models[self._local(expert)]

    def expert_state(self, expert: int) -> dict[str, Tensor]:
        """All weights of one model, which must live here."""
        return self.own.expert_state(self._local(expert))

    def load_expert_state(self, expert: int, state: dict[str, Tensor]) -> None:
        """Takes what `expert_state` gave."""
        self.own.load_expert_state(self._local(expert), state)

    def decoder(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"], experts: list[int] | None = None
    ) -> AbstractExpertDecoder:
        """Not here: text is written with the saved policy.

        Raises:
            ValueError: always.
        """
        raise ValueError("expert_parallel: no process holds all experts; load the saved policy and generate with it")

    def describe(self) -> dict[str, Any]:
        """As K independent experts in one process describe themselves; references by where they are found again."""
        return self._description

    def _local(self, expert: int) -> int:
        if expert not in self.own_experts:
            raise ValueError(f"expert {expert} lives on process {expert % self._processes}, not on {self._index}")
        return self.own_experts.index(expert)

    def _of_all(self, log_probs: Float[Tensor, "N M"], ref_log_probs: Float[Tensor, "N M"]) -> ExpertLogProbs:
        if self._processes == 1:
            return ExpertLogProbs(log_probs, ref_log_probs)
        both = self._gather(torch.stack([log_probs.detach(), ref_log_probs]))
        columns = torch.tensor(self.own_experts, device=log_probs.device)
        # The copy has the value that is there already; what it adds is the way back to the own models.
        return ExpertLogProbs(both[0].index_copy(1, columns, log_probs), both[1])

    def _gather(self, own: Float[Tensor, "2 N M"]) -> Float[Tensor, "2 N K"]:
        """The columns of all processes in the order of the experts: k = j W + i is column j of process i."""
        most = -(-self.num_experts // self._processes)
        padded = nn.functional.pad(own, (0, most - own.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self._processes)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=-1).flatten(-2)[..., : self.num_experts]

    def _described(self, own: dict[str, Any]) -> dict[str, Any]:
        """One description from those of all processes."""
        references = [None if entry is None else {**entry, "source": _findable(entry["source"])}
                      for entry in own["references"]]  # fmt: skip
        parts: list[Any] = [{**own, "references": references}]
        if self._processes > 1:
            parts = [None] * self._processes
            dist.all_gather_object(parts, {**own, "references": references})
        fields = {"num_experts": self.num_experts}
        in_order = {
            name: [parts[k % self._processes][name][k // self._processes] for k in range(self.num_experts)]
            for name in ("architectures", "references")
        }
        return {**own, **fields, **in_order}

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Inside, dropout draws for this process alone; outside, all processes go on with the same random numbers."""
        if self._processes == 1 or not self.training:
            yield
            return
        seed = int(torch.randint(2**31, (1,)))
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            torch.manual_seed(seed + self._index)
            yield


def _findable(source: str) -> str:
    """A folder by its full path: the policy that names it may stand elsewhere."""
    return os.path.abspath(source) if Path(source).exists() else source
