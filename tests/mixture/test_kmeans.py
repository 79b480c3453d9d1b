"""K-means against enumeration of all clusterings, and its corner cases."""

import itertools

import pytest
import torch

from prefmix.mixture.kmeans import kmeans, nearest_centre


def test_finds_the_best_of_all_clusterings_of_few_points():
    points = torch.randn(8, 2, generator=torch.Generator().manual_seed(5))
    inertias = []
    for labels in itertools.product([0, 1], repeat=8):
        label = torch.tensor(labels)
        parts = [points[label == c] for c in (0, 1) if (label == c).any()]
        inertias.append(sum(float((part - part.mean(0)).square().sum()) for part in parts))
    result = kmeans(points, 2, torch.Generator().manual_seed(0), restarts=20)
    assert float(result.inertia) == pytest.approx(min(inertias), rel=1e-5)
    assert torch.equal(nearest_centre(points, result.centres), result.label)


def test_more_clusters_than_distinct_points():
    result = kmeans(torch.ones(5, 2), 3, torch.Generator().manual_seed(0))
    assert float(result.inertia) == 0.0 and torch.isfinite(result.centres).all()
