"""Rankings of any length, and the best of n: Plackett-Luce. Legend: N texts, R rankings, M ranked texts, K experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.precision import at_least_float32


class Rankings(NamedTuple):
    """R rankings end to end, ragged.

    Attributes:
        texts: [M] index of every ranked text, best first, ranking after ranking.
        size: [R] texts of each ranking, at least 1; sum M.
        stages: [R] how many places were judged: size - 1 for a full order, 1 for the best of n. The others are known
            only to come after them.
    """

    texts: Int[Tensor, "M"]
    size: Int[Tensor, "R"]
    stages: Int[Tensor, "R"]


def plackett_luce(rewards: Float[Tensor, "N K"], rankings: Rankings) -> Float[Tensor, "R K"]:
    """Log-probability of the judged places: the best of all, then the best of the rest, and so on.

        log p_k = sum_{j <= stages} [r_(j) - log sum_{l >= j} exp r_(l)]

    Args:
        rewards: [N, K] r_k of the distinct texts, nats.
        rankings: over these texts.

    Returns:
        [R, K] nats; finite with finite gradients at rewards of +-1e4. With two texts this is Bradley-Terry.

    Source: Plackett 1975; Luce 1959. As a DPO loss: Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3.
    """
    size, stages = rankings.size, rankings.stages
    longest = int(size.max()) if len(size) else 0
    start = size.cumsum(0) - size
    place = torch.arange(longest, device=size.device)
    inside = place < size.unsqueeze(1)
    position = torch.where(inside, start.unsqueeze(1) + place, 0)
    reward = at_least_float32(rewards)[rankings.texts[position]] if longest else rewards.new_zeros(len(size), 0, 1)
    log_lik = reward.new_zeros(len(size), rewards.shape[1])
    remaining = log_lik
    # From the last place on: each step adds one text to the set from which the judge chose.
    for j in reversed(range(longest)):
        present, last = inside[:, j : j + 1], (size == j + 1).unsqueeze(1)
        # Both branches are finite, so no gradient is 0 * inf.
        grown = torch.where(last, reward[:, j], torch.logaddexp(remaining, reward[:, j]))
        remaining = torch.where(present, grown, remaining)
        judged = (j < stages).unsqueeze(1) & ~last
        log_lik = log_lik + torch.where(judged, reward[:, j] - remaining, 0.0)
    return log_lik
