"""Group DRO in training: an adversary weighs groups of rows, and moves to those that fare badly.

    minimise max_g L_g,   L_g = - sum_{i of g} bound_i / W_g,   W_g = sum_{i of g} a_i
    rows:        row i of group g weighs c_g W / W_g beside its a_i, so that a batch's loss is an unbiased estimate of
                 sum_g c_g L_g, whichever groups stand in it; with all rows in one batch it is that sum
    adversary:   c_g proportional to c_g exp(eta L_g) after every optimizer step, L_g the mean over the rows of g in the
                 step's batch; a group without rows there counts with its last batch that had some

`bound_i` is the objective's, a_i log p_i where there is one expert. Counting absent groups as 0 instead would let
frequent groups gain for being frequent. Weights are those of the M-steps of experts and gate. Responsibilities, q(z)
and learnt label noise are about what people said, not about who counts, and stay as they are.

Legend: R training rows, B rows of a batch, G groups, W summed weight of all rows.

Source: Sagawa et al. 2020 (arXiv 1911.08731), algorithm 1, which draws groups alike where we draw rows alike; for DPO,
Ramesh et al. 2024 (arXiv 2405.20304).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.mixture.group_objectives import worse_groups_gain
from prefmix.training.config import MixtureConfig
from prefmix.training.processes import Readers, summed

# So many groups are named in the log and the model card; of more, the worst and the heaviest. Users never are.
NAMED = 8


class GroupAdversary:
    """Weights of groups and the losses behind them; everything here is checkpointed and restored bit for bit.

    Attributes:
        log_weights: [G] log c_g, at first of equal weights.
        loss: [G] L_g of the last batch that had the group, nats; NaN before.
        names: of the groups that may be named; none where they are users.
    """

    def __init__(self, table: ComparisonTable, args: MixtureConfig, device: torch.device) -> None:
        """Reads the groups of the training rows.

        Raises:
            ValueError: a row names none.
        """
        over = args.robust_over
        assert over is not None, "group DRO is asked for"
        names, group = _row_groups(table, over)
        self.names, self._over, self._step = names if over == "group" else [], over, args.robust_step
        self._group = torch.from_numpy(group).to(device)
        weight = torch.from_numpy(table.weight).to(device).double()
        self.loss = torch.full((len(names),), torch.nan, dtype=torch.float64, device=device)
        self.log_weights = torch.full_like(self.loss, len(names)).log().neg()
        self._share = self._by_group(self._group, weight) / weight.sum()
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)

    def of_rows(self, row: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """[B] c_g W / W_g of some training rows, a negative index ~i being a copy of row i; None: of all of them."""
        group = self._group if row is None else self._group[torch.where(row < 0, ~row, row)]
        return (self.log_weights.exp() / self._share)[group]

    def weigh(self, inputs: dict[str, Tensor], bound: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The rows' bounds as the adversary weighs them; remembers them for its own step.

        Args:
            inputs: the batch.
            bound: [B] a_i times the bound of each row, with gradient.
        """
        row = inputs["row"]
        group = self._group[torch.where(row < 0, ~row, row)]
        parts = [self._by_group(group, part.detach().double()) for part in (-bound, inputs["weight"])]
        self._sums += torch.stack(parts)
        return bound * self.of_rows(row).to(bound.dtype)

    def step(self, readers: Readers) -> None:
        """Moves the weights by the losses of the batch of all processes."""
        total, weight = summed(readers, self._sums)
        self._sums = torch.zeros_like(self._sums)
        self.loss = torch.where(weight > 0, total / weight, self.loss)
        # A group that no batch has had yet gains as much as the mean of the others: it neither rises nor falls.
        known = ~self.loss.isnan()
        loss = torch.where(known, self.loss, self.loss[known].mean())
        self.log_weights = worse_groups_gain(self.log_weights, loss, self._step)

    def figures(self) -> dict[str, float]:
        """What the log says: the worst group's loss, the largest weight, and both of each where groups are few.

        Losses are those of training rows in the batches that had them last, as the adversary sees them.
        """
        weights, loss = self.log_weights.exp().tolist(), self.loss.tolist()
        known = [value for value in loss if value == value]
        found = {"mixture/largest_group_weight": max(weights)}
        found |= {"mixture/worst_group_loss": max(known)} if known else {}
        if len(weights) <= NAMED:
            found |= {f"mixture/group_weight/{name}": w for name, w in zip(self.names, weights)}
            found |= {f"mixture/group_loss/{name}": v for name, v in zip(self.names, loss) if v == v}
        return found

    def record(self) -> dict[str, Any]:
        """JSON values for the model card: over what, how many groups, the largest weight, and the heaviest by name."""
        weights = self.log_weights.exp()
        heaviest = torch.argsort(weights, descending=True, stable=True)[:NAMED].tolist() if self.names else []
        named = {self.names[g]: round(float(weights[g]), 4) for g in heaviest}
        return {"over": self._over, "groups": len(weights), "largest_weight": float(weights.max()), "weights": named}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        digest = hashlib.sha256(np.ascontiguousarray(self._group.cpu().numpy()).tobytes()).hexdigest()
        return {"robust_over": self._over, "robust_step": self._step, "robust_groups_sha256": digest}

    def state_dict(self) -> dict[str, Tensor]:
        """`group_log_weights` and `group_loss`."""
        return {"group_log_weights": self.log_weights.clone(), "group_loss": self.loss.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave."""
        self.log_weights.copy_(state["group_log_weights"])
        self.loss.copy_(state["group_loss"])

    def _by_group(self, group: Int[Tensor, "B"], values: Float[Tensor, "B"]) -> Float[Tensor, "G"]:
        return values.new_zeros(len(self.loss)).index_add_(0, group, values)


def _row_groups(table: ComparisonTable, over: str) -> tuple[list[str], np.ndarray]:
    """Names of the groups that have rows, and [R] which of them each training row belongs to."""
    column, names = (table.group, table.groups) if over == "group" else (table.user, table.users)
    if (column < 0).any():
        raise ValueError(
            f"robust_over={over!r}: {int((column < 0).sum())} training rows name no {over}; add the column {over!r}, "
            f"or use robust_over: {'user' if over == 'group' else 'group'}"
        )
    present, group = np.unique(column, return_inverse=True)
    return [str(names[g]) for g in present], group.reshape(-1)
