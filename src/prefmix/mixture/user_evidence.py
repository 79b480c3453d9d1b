"""Running evidence of groups across minibatches: incremental EM.

A batch holds a few of a user's comparisons, the posterior needs all of them. Every row's last log-likelihoods are
kept, and the evidence of a group is the sum of what is kept of its rows.

Source: Neal & Hinton 1998, "A view of the EM algorithm that justifies incremental, sparse, and other variants".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.precision import at_least_float32

# Rows whose float64 copies are held together while all groups are summed.
ROWS_AT_ONCE = 65_536


class GroupRows(NamedTuple):
    """C rows of M groups, with what is kept of them.

    Attributes:
        row: [C] positions in the training set.
        segment: [C] which of the M groups, 0..M-1.
        log_lik: [C, K] last log-likelihoods, nats.
        weight: [C] a_i.
    """

    row: Int[Tensor, "C"]
    segment: Int[Tensor, "C"]
    log_lik: Float[Tensor, "C K"]
    weight: Float[Tensor, "C"]


class UserEvidence:
    """The last log-likelihoods [R, K] of every training row, and their sums over groups.

    Sums are taken afresh from the table (in float64) for the groups that a batch touches. Adding differences to running
    sums would be cheaper for users with very many rows, but rounding would accumulate over the steps, and a resumed
    run would need the sums bit for bit as well.

    Attributes:
        table: [R, K] float32, the last log-likelihood of each row, 0 where unvisited (no evidence). 4K bytes a row.
        visited: [R] bool, rows seen since the start.
    """

    def __init__(
        self,
        num_rows: int,
        num_experts: int,
        group: Int[Tensor, "R"],
        weight: Float[Tensor, "R"],
        num_groups: int,
        per_pair: bool,
    ) -> None:
        """Starts without evidence.

        Args:
            num_rows: R, rows of the training set.
            num_experts: K.
            group: [R] group of each row, 0..G-1.
            weight: [R] row weights: they multiply the log-likelihood inside the group.
            num_groups: G.
            per_pair: every row is its own group (`latent="pair"`). Then nothing is kept: the evidence of a row is its
                current log-likelihood, and the weight stays outside the logarithm.
        """
        assert group.shape == weight.shape == (num_rows,)
        self.num_experts = num_experts
        self.num_groups = num_groups
        self.per_pair = per_pair
        kept = 0 if per_pair else num_rows
        self.table = torch.zeros(kept, num_experts, dtype=torch.float32, device=group.device)
        self.visited = torch.zeros(kept, dtype=torch.bool, device=group.device)
        self._group = group[:kept]
        self._weight = weight[:kept].double()
        # Rows sorted by group: the rows of group g are _rows[_start[g] : _start[g] + _size[g]].
        self._rows = torch.argsort(self._group, stable=True)
        self._size = torch.bincount(self._group, minlength=num_groups)
        self._start = torch.cumsum(self._size, dim=0) - self._size

    def update(self, row: Int[Tensor, "B"], log_lik: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Keeps the rows' log-likelihoods and gives the evidence of their groups.

        Args:
            row: [B] positions in the training set. In a distributed run, the rows of all ranks, gathered.
            log_lik: [B, K] log p_ik, nats.

        Returns:
            [B, K] for every row, sum over the visited rows j of its group of a_j log p_jk; detached.
        """
        log_lik = at_least_float32(log_lik.detach())
        if self.per_pair:
            return log_lik
        row_here = row.to(self.table.device)
        self.table[row_here] = log_lik.to(self.table)
        self.visited[row_here] = True
        touched, position = torch.unique(self._group[row_here], return_inverse=True)
        return self._sums(touched)[position].to(log_lik)

    def group_evidence(self) -> Float[Tensor, "G K"]:
        """Evidence of every group from the visited rows, float32."""
        assert not self.per_pair, "under latent='pair' no evidence is kept between batches"
        sums = torch.zeros(self.num_groups, self.num_experts, dtype=torch.float64, device=self.table.device)
        # In slices: whole, the float64 copies of the table would take four times what the table does.
        columns = (self.table, self._weight, self._group)
        for table, weight, group in zip(*(column.split(ROWS_AT_ONCE) for column in columns), strict=True):
            sums.index_add_(0, group, table.double().mul_(weight.unsqueeze(1)))
        return sums.float()

    def rows_of(self, group: Int[Tensor, "M"]) -> GroupRows:
        """The visited rows of some groups, wherever they stand in the training set.

        Args:
            group: [M] distinct groups.
        """
        assert not self.per_pair, "under latent='pair' no evidence is kept between batches"
        rows, segment = self._rows_of(group)
        seen = self.visited[rows]
        return GroupRows(rows[seen], segment[seen], self.table[rows[seen]], self._weight[rows[seen]])

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: `table` and `visited` (empty under `per_pair`)."""
        return {"table": self.table.clone(), "visited": self.visited.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave.

        Raises:
            ValueError: the state belongs to another number of rows or experts.
        """
        if state["table"].shape != self.table.shape or state["visited"].shape != self.visited.shape:
            raise ValueError(
                f"user evidence of shape {tuple(state['table'].shape)} (rows, experts) cannot be loaded where "
                f"{tuple(self.table.shape)} is needed. Resume with the training rows and num_experts of the first run."
            )
        self.table.copy_(state["table"])
        self.visited.copy_(state["visited"])

    def _sums(self, touched: Int[Tensor, "M"]) -> Float[Tensor, "M K"]:
        """Fresh float64 sums over all rows of the groups `touched`."""
        rows, segment = self._rows_of(touched)
        contribution = self.table[rows].double() * self._weight[rows].unsqueeze(1)
        sums = torch.zeros(len(touched), self.num_experts, dtype=torch.float64, device=rows.device)
        return sums.index_add_(0, segment, contribution)

    def _rows_of(self, touched: Int[Tensor, "M"]) -> tuple[Int[Tensor, "C"], Int[Tensor, "C"]]:
        """All rows of the groups `touched`, group after group, and which of them (0..M-1) each belongs to."""
        size = self._size[touched]
        segment = torch.repeat_interleave(torch.arange(len(touched), device=size.device), size)
        first = torch.cumsum(size, dim=0) - size
        offset = torch.arange(len(segment), device=size.device) - first[segment]
        return self._rows[self._start[touched][segment] + offset], segment
