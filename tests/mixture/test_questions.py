"""Mutual information against enumeration of the joint distribution, and what it must be at the ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from prefmix.mixture.questions import answer_information


def _information(weights, margins) -> torch.Tensor:
    margins = torch.as_tensor(np.asarray(margins), dtype=torch.float64)
    log_weights = torch.as_tensor(weights, dtype=torch.float64).log().expand_as(margins)
    return answer_information(log_weights, logsigmoid(margins), logsigmoid(-margins))


def test_it_is_the_divergence_of_the_joint_from_independence() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(scale=3.0, size=(7, 4))
    weights = rng.dirichlet(np.ones(4))
    found = _information(weights, margins)
    for c in range(7):
        first = 1 / (1 + np.exp(-margins[c]))
        joint = np.stack([weights * first, weights * (1 - first)])
        independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        assert float(found[c]) == pytest.approx((joint * np.log(joint / independent)).sum(), abs=1e-12)


def test_it_is_the_expected_fall_of_the_posteriors_entropy() -> None:
    """Independent path: Bayes' rule for both answers."""
    weights, margins = np.array([0.5, 0.3, 0.2]), np.array([2.0, -1.0, 0.3])
    first = 1 / (1 + np.exp(-margins))

    def entropy(p: np.ndarray) -> float:
        return float(-(p * np.log(p)).sum())

    expected = entropy(weights)
    for answer in (first, 1 - first):
        total = weights @ answer
        expected -= total * entropy(weights * answer / total)
    assert float(_information(weights, [margins])[0]) == pytest.approx(expected, abs=1e-12)


def test_agreement_indecision_and_certainty_tell_nothing_and_opposition_one_bit() -> None:
    even = [0.5, 0.5]
    found = _information(even, [[3.0, 3.0], [0.0, 0.0], [40.0, -40.0], [1e4, -1e4]])
    torch.testing.assert_close(
        found, torch.tensor([0.0, 0.0, math.log(2), math.log(2)], dtype=torch.float64), atol=1e-12, rtol=0
    )
    certain = _information([1.0, 0.0], [[40.0, -40.0], [1e4, -1e4]])
    torch.testing.assert_close(certain, torch.zeros(2).double(), atol=1e-12, rtol=0)


def test_the_order_of_responses_and_of_experts_does_not_matter() -> None:
    margins = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double() * 2
    weights = torch.tensor([0.2, 0.5, 0.3])
    found = _information(weights, margins)
    torch.testing.assert_close(_information(weights, -margins), found)
    torch.testing.assert_close(_information(weights[[2, 0, 1]], margins[:, [2, 0, 1]]), found)
