"""First responsibilities: the named, seeded step that breaks the symmetry between experts.

Equal experts get equal gradients and never part (method fact 3), so training starts from responsibilities [G, K], held
until the experts differ. `probe.fit_probe` is the default start; these are the others. Each returns probabilities.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from prefmix.mixture.gaussian_clusters import shared_shape_clusters
from prefmix.mixture.kmeans import kmeans


def random_resp(num_groups: int, num_experts: int, generator: torch.Generator) -> Float[Tensor, "G K"]:
    """Rows drawn from a flat Dirichlet distribution: no opinion, but no symmetry either."""
    draws = torch.empty(num_groups, num_experts).exponential_(generator=generator)
    return draws / draws.sum(dim=1, keepdim=True)


def label_resp(labels: Int[Tensor, "G"], num_experts: int) -> Float[Tensor, "G K"]:
    """One-hot rows of the given labels; uniform where the label is -1 (unknown).

    Raises:
        ValueError: a label is not below num_experts.
    """
    if len(labels) and int(labels.max()) >= num_experts:
        raise ValueError(
            f"a label is {int(labels.max())}, but num_experts is {num_experts}: labels run from 0 to num_experts - 1. "
            "Raise num_experts to the number of true groups."
        )
    known = (labels >= 0).unsqueeze(1)
    return torch.where(known, one_hot(labels.clamp(min=0), num_experts).float(), torch.tensor(1.0 / num_experts))


def kmeans_resp(features: Float[Tensor, "G P"], num_experts: int, generator: torch.Generator) -> Float[Tensor, "G K"]:
    """One-hot rows of the clusters of the groups' features (prompt states, or a user's mean difference).

    K-means, and from there clusters of one common shape (`gaussian_clusters`), where points are enough to know it.
    Groups of a column are on its scale: standardise the features first.
    """
    label = kmeans(features, num_experts, generator).label
    return one_hot(shared_shape_clusters(features, label, num_experts).label, num_experts).float()
