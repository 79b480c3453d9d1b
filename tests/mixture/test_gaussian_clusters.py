"""EM's own theorems, and clusters that k-means cuts askew."""

from __future__ import annotations

import pytest
import torch

from prefmix.mixture.gaussian_clusters import shared_shape_clusters
from prefmix.mixture.kmeans import kmeans


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _two_kinds(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points that differ by kind in one direction, and vary within a kind along another, not at right angles to it."""
    truth = torch.arange(count) % 2
    long = torch.randn(count, 1, generator=_generator(seed)) @ torch.tensor([[1.2, 1.0, 0.0]])
    short = 0.3 * torch.randn(count, 3, generator=_generator(seed + 1))
    return long + short + truth.unsqueeze(1) * torch.tensor([2.6, 0.0, 0.0]), truth


def _share(label: torch.Tensor, truth: torch.Tensor) -> float:
    same = float((label == truth).float().mean())
    return max(same, 1 - same)


def test_likelihood_never_falls_and_an_oblique_cut_becomes_fishers() -> None:
    points, truth = _two_kinds(600, 0)
    first = kmeans(points, 2, _generator()).label
    fit = shared_shape_clusters(points, first, 2)
    assert all(after >= before - 1e-3 for before, after in zip(fit.log_lik, fit.log_lik[1:], strict=False))  # the ridge
    assert fit.log_lik[-1] > fit.log_lik[0]
    assert _share(first, truth) < 0.95 and _share(fit.label, truth) > 0.99


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_linear_map_of_the_points_changes_no_label(seed: int) -> None:
    points, _ = _two_kinds(400, seed)
    first = kmeans(points, 2, _generator()).label
    turned = points @ torch.randn(3, 3, generator=_generator(seed)) + 5.0
    label = shared_shape_clusters(points, first, 2).label
    assert torch.equal(label, shared_shape_clusters(turned, first, 2).label)


def test_few_points_or_points_that_are_alike_stay_where_they_were() -> None:
    few = torch.randn(7, 20, generator=_generator())
    label = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    assert torch.equal(shared_shape_clusters(few, label, 2).label, label)
    alike = torch.ones(100, 4)
    assert torch.equal(shared_shape_clusters(alike, torch.arange(100) % 2, 2).label, torch.arange(100) % 2)


def test_it_draws_nothing_from_the_global_generator() -> None:
    points, _ = _two_kinds(100, 3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    shared_shape_clusters(points, torch.arange(100) % 2, 2)
    assert torch.equal(torch.rand(3), expected)
