"""What the experts say of the texts of whole tables: read when asked, or once where nothing that trains reaches it.

Where the gate alone learns (`train_experts: false`), log pi_k(y | x) and log pi_ref(k)(y | x) are constants of the run:
E-step, M-step of the gate, and evaluation read numbers, and neither heads nor trunk run again. Experts are then read as
a policy reads them, without the dropout that a model of their kind may have. Legend: N distinct texts, K experts.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.evaluation.scoring import ReadTexts, read_texts
from prefmix.experts.interface import AbstractExperts, ExpertLogProbs
from prefmix.training.config import MixtureConfig
from prefmix.training.expert_options import reads_experts_once
from prefmix.training.setup import Comparisons


class Readings:
    """Log-probabilities of texts, kept for as long as their table lives where they cannot change.

    Attributes:
        known: of every training text, on the training device; None: steps run the experts.
    """

    def __init__(
        self, experts: AbstractExperts, train: Comparisons, args: MixtureConfig, accelerator: Accelerator
    ) -> None:
        """Reads the training texts where that is done once; all processes must come here together.

        Args:
            experts: on their device, not divided among processes yet.
            train: training rows.
            args: says what trains.
            accelerator: knows the processes, which share the texts.
        """
        self._experts = experts
        self._kept: dict[int, ReadTexts] = {}
        once = reads_experts_once(vars(args)) and accelerator.state.deepspeed_plugin is None
        self.known = self._read_together(train, accelerator) if once else None

    def of(self, comparisons: Comparisons) -> ReadTexts:
        """Log-probabilities of the texts that a table's rows name."""
        table = comparisons.table
        if self.known is None:
            return read_texts(self._experts, table, states=comparisons.states)
        if id(table) not in self._kept:
            self._keep(comparisons, self._read(comparisons, np.unique(table.compared)))
        return self._kept[id(table)]

    def of_batch(self, text_ids: Int[Tensor, "n"]) -> dict[str, Float[Tensor, "n K"]]:
        """What a batch is told of its texts: `log_probs` and `ref_log_probs`, or nothing."""
        if self.known is None:
            return {}
        return {"log_probs": self.known.log_probs[text_ids], "ref_log_probs": self.known.ref_log_probs[text_ids]}

    def _read_together(self, train: Comparisons, accelerator: Accelerator) -> ExpertLogProbs:
        used = np.unique(train.table.compared)
        own = self._read(train, used[accelerator.process_index :: accelerator.num_processes])
        found = torch.zeros(2, len(train.table.texts), self._experts.num_experts, device=accelerator.device)
        found[:, own.used] = torch.stack(list(own.log_probs)).to(found)
        found = accelerator.reduce(found, reduction="sum") if accelerator.num_processes > 1 else found
        self._keep(train, ReadTexts(used, ExpertLogProbs(*found[:, used].cpu())))
        return ExpertLogProbs(*found)

    def _read(self, comparisons: Comparisons, texts: Int[np.ndarray, "n"]) -> ReadTexts:
        was_training = self._experts.training
        self._experts.eval()
        found = read_texts(self._experts, comparisons.table, states=comparisons.states, texts=texts)
        self._experts.train(was_training)
        return found

    def _keep(self, comparisons: Comparisons, found: ReadTexts) -> None:
        table = comparisons.table
        self._kept[id(table)] = found
        weakref.finalize(table, self._kept.pop, id(table), None)
