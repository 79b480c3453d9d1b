"""K-means with k-means++ seeds and restarts, in torch, seeded by an explicit generator.

Legend: N points, P features, C clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.precision import at_least_float32


class KMeans(NamedTuple):
    """A clustering.

    Attributes:
        label: [N] nearest centre of each point.
        centres: [C, P] means of the clusters.
        inertia: [] sum of squared distances to the nearest centre, in squared feature units.
    """

    label: Int[Tensor, "N"]
    centres: Float[Tensor, "C P"]
    inertia: Float[Tensor, ""]


def kmeans(
    points: Float[Tensor, "N P"],
    num_clusters: int,
    generator: torch.Generator,
    *,
    restarts: int = 8,
    iterations: int = 50,
) -> KMeans:
    """Lloyd's algorithm from several k-means++ starts; the smallest inertia is kept.

    A cluster that loses all its points keeps its centre. With fewer distinct points than clusters, some stay empty.

    Source: Arthur & Vassilvitskii 2007.
    """
    points = at_least_float32(points)
    assert num_clusters >= 1 and len(points) >= 1
    runs = [_lloyd(points, _seeds(points, num_clusters, generator), iterations) for _ in range(restarts)]
    return min(runs, key=lambda run: float(run.inertia))


def nearest_centre(points: Float[Tensor, "N P"], centres: Float[Tensor, "C P"]) -> Int[Tensor, "N"]:
    """Index of the nearest centre of each point."""
    return torch.cdist(at_least_float32(points), centres).argmin(dim=1)


def _seeds(points: Float[Tensor, "N P"], num_clusters: int, generator: torch.Generator) -> Float[Tensor, "C P"]:
    """k-means++: each next centre is drawn with probability proportional to the squared distance to those before."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    centres = [points[first]]
    distance = (points - centres[0]).square().sum(dim=1)
    for _ in range(num_clusters - 1):
        total = distance.sum()
        chance = distance / total if total > 0 else torch.ones_like(distance)
        centres.append(points[int(torch.multinomial(chance.cpu(), 1, generator=generator))])
        distance = torch.minimum(distance, (points - centres[-1]).square().sum(dim=1))
    return torch.stack(centres)


def _lloyd(points: Float[Tensor, "N P"], centres: Float[Tensor, "C P"], iterations: int) -> KMeans:
    label = nearest_centre(points, centres)
    for _ in range(iterations):
        count = torch.bincount(label, minlength=len(centres)).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, label, points)
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
        moved = nearest_centre(points, centres)
        if torch.equal(moved, label):
            break
        label = moved
    return KMeans(label, centres, (points - centres[label]).square().sum())
