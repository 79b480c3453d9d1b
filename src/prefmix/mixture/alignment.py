"""Which expert of one fit is which of another: label switching undone by an optimal assignment.

Legend: G groups, K experts, S restarts. Source: Kuhn 1955; Jonker & Volgenant 1987 (shortest augmenting paths).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.precision import at_least_float32


class Alignment(NamedTuple):
    """Restarts in the order of a reference's experts.

    Attributes:
        order: [S, K] column of restart s that is the reference's expert k.
        log_resp: [S, G, K] log q of the restarts, columns in the reference's order.
        overlap: [S] mean over groups of sum_k q_gk(s) q_gk(reference), 1 where both are sure and agree.
    """

    order: Int[Tensor, "S K"]
    log_resp: Float[Tensor, "S G K"]
    overlap: Float[Tensor, "S"]


def assign(score: Float[Tensor, "K K"]) -> Int[Tensor, "K"]:
    """The one-to-one assignment of columns to rows with the largest sum of scores: argmax_p sum_k score[k, p_k].

    Rows enter one after another by shortest augmenting paths, K^3 operations in all; among equal sums the first found
    is kept.

    Args:
        score: [K, K] finite.

    Returns:
        [K] p, the column of each row.
    """
    cost = (-score.double()).tolist()
    size = len(cost)
    # One-based as in the literature: row 0 and column 0 are where an augmenting path starts.
    potential_row, potential_column = [0.0] * (size + 1), [0.0] * (size + 1)
    row_of = [0] * (size + 1)
    for row in range(1, size + 1):
        previous = _shortest_path(cost, row, row_of, potential_row, potential_column)
        column = previous.end
        while column:
            row_of[column] = row_of[previous.column[column]]
            column = previous.column[column]
    order = [0] * size
    for column in range(1, size + 1):
        order[row_of[column] - 1] = column - 1
    return torch.tensor(order)


def align(log_resp: Float[Tensor, "S G K"], reference: Float[Tensor, "G K"]) -> Alignment:
    """Renames the experts of each restart so that they share the most groups with the reference's.

    Args:
        log_resp: [S, G, K] log q of restarts.
        reference: [G, K] log q of the one to compare with.
    """
    resp, target = at_least_float32(log_resp).exp(), at_least_float32(reference).exp()
    shared = torch.einsum("gk,sgj->skj", target, resp.to(target))
    order = torch.stack([assign(matrix) for matrix in shared])
    aligned = log_resp.gather(2, order.unsqueeze(1).expand(-1, log_resp.shape[1], -1))
    overlap = shared.gather(2, order.unsqueeze(2)).sum(dim=(1, 2)) / max(1, len(reference))
    return Alignment(order, aligned, overlap)


class _Path(NamedTuple):
    """The column before each on the shortest path, and the free column where it ends."""

    column: list[int]
    end: int


def _shortest_path(
    cost: list[list[float]],
    row: int,
    row_of: list[int],
    potential_row: list[float],
    potential_column: list[float],
) -> _Path:
    """Dijkstra over reduced costs from a new row to a free column; updates the potentials on the way."""
    size = len(cost)
    row_of[0] = row
    distance, previous, done = [math.inf] * (size + 1), [0] * (size + 1), [False] * (size + 1)
    column = 0
    while True:
        done[column] = True
        here, step, following = row_of[column], math.inf, 0
        for j in range(1, size + 1):
            if done[j]:
                continue
            reduced = cost[here - 1][j - 1] - potential_row[here] - potential_column[j]
            if reduced < distance[j]:
                distance[j], previous[j] = reduced, column
            if distance[j] < step:
                step, following = distance[j], j
        for j in range(size + 1):
            if done[j]:
                potential_row[row_of[j]] += step
                potential_column[j] -= step
            else:
                distance[j] -= step
        column = following
        if row_of[column] == 0:
            return _Path(previous, column)
