"""Group-robust DPO: one expert for the worst group (group DRO), by the same trainer.

    minimise max_g L_g,   L_g = mean_{i of g} -log p_i:   c_g proportional to c_g exp(eta L_g) of the batch,
    and a row of group g weighs c_g B / B_g, so that the batch's loss is an unbiased estimate of sum_g c_g L_g

Legend: B training rows, G groups, K = 1 expert.

Source: Sagawa et al. 2020 (arXiv 1911.08731), algorithm 1; for DPO, Ramesh et al. 2024 (arXiv 2405.20304).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefmix.data.comparisons import ComparisonTable
from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.objective import Likelihoods
from prefmix.training.trainer import MixtureTrainer


def worse_groups_gain(
    log_counts: Float[Tensor, "G"], loss: Float[Tensor, "B"], group: Int[Tensor, "B"], step: float
) -> Float[Tensor, "G"]:
    """[G] log c_g after one batch: groups that stand in it gain `step` times their mean loss; normalised.

    Args:
        log_counts: [G] log c_g.
        loss: [B] -log p_i of the batch, nats.
        group: [B] 0..G-1.
        step: eta, per nat.
    """
    size = torch.bincount(group, minlength=len(log_counts)).clamp(min=1)
    mean = torch.zeros_like(log_counts).index_add_(0, group, loss.to(log_counts)) / size
    return torch.log_softmax(log_counts + step * mean, dim=0)


def row_groups(table: ComparisonTable, over: Literal["group", "user"]) -> np.ndarray:
    """[B] 0..G-1, the group of each training row.

    Raises:
        ValueError: a row names none.
    """
    column = table.group if over == "group" else table.user
    if (column < 0).any():
        raise ValueError(
            f"robust_over={over!r}: {int((column < 0).sum())} training rows name no {over}; add the column, or use "
            f"robust_over: {'user' if over == 'group' else 'group'}"
        )
    return np.unique(column, return_inverse=True)[1]


class GroupRobustTrainer(MixtureTrainer):
    """One expert whose rows weigh as much as an adversary says, who looks for the group that fares worst.

    Attributes:
        log_counts: [G] log c_g; start the adversary with `set_groups`.
    """

    def set_groups(self, group: np.ndarray, step: float) -> None:
        """Which group each training row belongs to, and eta."""
        assert self.args.num_experts == 1, "group DRO trains one expert"
        self.row_group, self.step = torch.from_numpy(group).to(self.args.device), step
        self.share = torch.bincount(self.row_group).double() / len(group)
        self.log_counts = -torch.full_like(self.share, len(self.share)).log()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of the reweighted batch; the adversary moves after it."""
        group = self.row_group[inputs["row"]]
        factor = (self.log_counts.exp() / self.share)[group].to(inputs["weight"])
        result = super().compute_loss(
            model, {**inputs, "weight": inputs["weight"] * factor}, return_outputs, num_items_in_batch
        )
        self.log_counts = worse_groups_gain(self.log_counts, -self._seen[:, 0], group, self.step)
        return result

    def _likelihoods(self, output: MixtureOutput, inputs: dict[str, Tensor], beta: Tensor | None = None) -> Likelihoods:
        found = super()._likelihoods(output, inputs, beta)
        self._seen = found.log_lik.detach()
        return found
