"""Spectral starts: k-means on the leading directions of how users answered.

Users of one taste give the same signs to the same pairs, so a matrix of users x pairs has one direction for each taste
more than one. Where users share no pairs the features of the pairs stand in: the sum of a user's differences is the
sign matrix times the pairs' features. Legend: B comparisons, G groups, Q pairs, P features, K experts, S starts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from prefmix.mixture.kmeans import kmeans
from prefmix.mixture.linear_em import ProbeData
from prefmix.mixture.posterior import group_log_lik
from prefmix.mixture.precision import at_least_float32

# A start is a guess: EM must still be able to move every group.
CONFIDENCE = 0.9
# Columns of the sign matrix beyond which the most answered pairs stand for all.
MAX_PAIRS = 500


def sign_matrix(
    chosen: Int[Tensor, "B"],
    rejected: Int[Tensor, "B"],
    group: Int[Tensor, "B"],
    num_groups: int,
    weight: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "G Q"]:
    """Sum of signs that each group gave to each pair of texts that several groups judged.

    A sign is +1 where the text with the larger index won. Pairs that one group alone judged tell groups apart by who
    was asked, not by what they said, and are left out; Q may be 0.

    Args:
        chosen: [B] index of the preferred text.
        rejected: [B] index of the other text.
        group: [B] 0..G-1.
        num_groups: G.
        weight: [B] row weights; None for ones.
    """
    ends = torch.stack([torch.minimum(chosen, rejected), torch.maximum(chosen, rejected)], dim=1)
    pair = torch.unique(ends, dim=0, return_inverse=True)[1]
    asked = torch.unique(torch.stack([pair, group], dim=1), dim=0)[:, 0]
    judges = torch.bincount(asked, minlength=int(pair.max()) + 1)
    kept = torch.argsort(judges, descending=True, stable=True)[:MAX_PAIRS]
    kept = kept[judges[kept] >= 2]
    column = torch.full_like(judges, -1)
    column[kept] = torch.arange(len(kept))
    seen = column[pair] >= 0
    sign = torch.where(chosen > rejected, 1.0, -1.0)
    sign = sign if weight is None else sign * weight.to(sign.dtype)
    cell = group[seen] * len(kept) + column[pair][seen]
    signs = torch.zeros(num_groups * len(kept)).index_add_(0, cell, sign[seen])
    return signs.view(num_groups, len(kept))


def summed_differences(data: ProbeData) -> Float[Tensor, "G P"]:
    """Sum of a_i d_i over each group's rows, over the root of their number: noise of one size for all groups.

    It is the score of a group at the reward of zero, up to a factor: where it would like to go.
    """
    weighted = data.difference * data.weight.unsqueeze(1)
    count = torch.bincount(data.group, minlength=data.num_groups).clamp(min=1)
    return group_log_lik(weighted, data.group, data.num_groups) / count.sqrt().unsqueeze(1)


def spectral_resp(matrix: Float[Tensor, "G Q"], num_experts: int, generator: torch.Generator) -> Float[Tensor, "G K"]:
    """Responsibilities of k-means clusters in the K leading left singular directions of a matrix of groups.

    Args:
        matrix: [G, Q] one row of answers for each group; rows of zeros get uniform responsibilities.
        num_experts: K.
        generator: source of the k-means starts.

    Returns:
        [G, K] rows sum to 1, CONFIDENCE beyond uniform on the cluster's expert.

    Source: spectral starts for mixtures, Vempala & Wang 2004.
    """
    matrix = at_least_float32(matrix)
    uniform = matrix.new_full((len(matrix), num_experts), 1.0 / num_experts)
    said = matrix.abs().sum(dim=1) > 0
    if num_experts == 1 or int(said.sum()) < num_experts:
        return uniform
    _, directions = torch.linalg.eigh(matrix[said].T @ matrix[said])
    label = kmeans(matrix[said] @ directions[:, -num_experts:], num_experts, generator).label
    resp = uniform.clone()
    resp[said] = CONFIDENCE * one_hot(label, num_experts).to(matrix) + (1.0 - CONFIDENCE) * uniform[said]
    return resp
