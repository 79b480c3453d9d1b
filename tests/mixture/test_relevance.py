"""A prior whose width the evidence chooses: theorems of the fit, and what it does with noise."""

from __future__ import annotations

import pytest
import torch

from prefmix.mixture.posterior import posterior
from prefmix.mixture.relevance import (
    BIAS_PRECISION,
    WIDEST,
    GroupEvidence,
    Relevance,
    fit_relevance,
    most_probable,
)

# Two fields: three categories, and one number.
FIELD = torch.tensor([0, 0, 0, 1])


def _people(count: int, seed: int, *, truth: float = 4.0, experts: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, and evidence of people whose category says which expert is theirs; the number is noise."""
    generator = torch.Generator().manual_seed(seed)
    category = torch.randint(3, (count,), generator=generator)
    noise = torch.randn(count, 1, generator=generator).double()
    weights = torch.softmax(truth * torch.eye(3, experts).double()[category], dim=1)
    expert = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    evidence = torch.randn(count, experts, generator=generator).double()
    evidence[torch.arange(count), expert] += 4.0
    return torch.cat([torch.eye(3).double()[category], noise], dim=1), evidence


def _fit(features: torch.Tensor, evidence: torch.Tensor, count: torch.Tensor | None = None) -> Relevance:
    count = torch.ones(len(features)) if count is None else count
    return fit_relevance(GroupEvidence(features, torch.zeros_like(evidence), evidence, count), FIELD)


def _log_weights(found: Relevance, features: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(found.bias + features @ found.weight.T, dim=1)


def _evidence(found: Relevance, features: torch.Tensor, evidence: torch.Tensor) -> float:
    return float(posterior(_log_weights(found, features), evidence).log_evidence.mean())


@pytest.mark.parametrize("seed", range(5))
def test_noise_gets_no_weight_and_what_tells_people_apart_helps_new_ones(seed: int) -> None:
    features, evidence = _people(36, seed)
    found = _fit(features, evidence)
    assert torch.isinf(found.precision[1]) and bool((found.weight[:, 3] == 0).all())
    assert torch.isfinite(found.precision[0]) and bool((found.weight[:, :3] != 0).all())
    new = _people(2000, seed + 100)
    nothing = Relevance(torch.zeros_like(found.weight), torch.zeros_like(found.bias), found.precision)
    assert _evidence(found, *new) > _evidence(nothing, *new) + 0.1


@pytest.mark.parametrize("seed", range(5))
def test_where_all_fields_are_noise_new_people_are_predicted_better_than_under_a_flat_prior(seed: int) -> None:
    features, evidence = _people(36, seed, truth=0.0)
    data = GroupEvidence(features, torch.zeros_like(evidence), evidence, torch.ones(36).double())
    flat = most_probable(torch.full((2,), WIDEST).double(), FIELD, data)
    new = _people(2000, seed + 100, truth=0.0)
    assert _evidence(_fit(features, evidence), *new) > _evidence(flat, *new)


@pytest.mark.parametrize("experts", [2, 3])
def test_weights_maximise_evidence_and_prior_together(experts: int) -> None:
    features, evidence = _people(60, 1, experts=experts)
    found = _fit(features, evidence)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    log_weights = torch.log_softmax(bias + features @ weight.T, dim=1)
    precision = torch.where(torch.isfinite(found.precision), found.precision, 0.0)[FIELD]
    prior = (precision * weight.square()).sum() / 2 + BIAS_PRECISION * bias.square().sum() / 2
    (posterior(log_weights, evidence).log_evidence.sum() - prior).backward()
    assert weight.grad is not None and bias.grad is not None
    kept = torch.isfinite(found.precision)[FIELD]
    assert weight.grad[:, kept].abs().max() < 0.05 and bias.grad.abs().max() < 0.05


def test_width_is_the_fixed_point_of_the_marginal_likelihood() -> None:
    """One feature, two experts, posteriors that are certain: gamma and |W|^2 can be written down."""
    sign = torch.ones(40).double()
    features = torch.cat([sign, -sign]).unsqueeze(1)
    right = torch.cat([torch.arange(40) < 34, torch.arange(40) >= 34]).long()  # 85% of either side
    evidence = 50.0 * torch.eye(2).double()[1 - right]
    found = fit_relevance(GroupEvidence(features, torch.zeros(80, 2), evidence, torch.ones(80)), torch.tensor([0]))
    half = float(found.weight[0, 0])
    probability = torch.sigmoid(torch.tensor(2 * half, dtype=torch.float64))
    information = 2 * 80 * float(probability * (1 - probability))  # along (1, -1) / sqrt 2
    gamma = information / (information + float(found.precision[0]))
    assert float(found.precision[0]) == pytest.approx(gamma / (2 * half**2), rel=0.02)
    assert 0.75 < probability < 0.85  # drawn a little to a half


def test_where_nothing_is_known_of_experts_the_gate_stays_even() -> None:
    features, evidence = _people(30, 0)
    found = _fit(features, torch.zeros_like(evidence))
    assert bool((found.weight == 0).all()) and found.bias.abs().max() < 1e-6


def test_a_group_s_own_constant_changes_nothing_and_counts_are_repetitions() -> None:
    features, evidence = _people(50, 2)
    found = _fit(features, evidence)
    shifted = _fit(features, evidence - 1000.0 * torch.rand(50, 1).double())
    assert torch.allclose(found.weight, shifted.weight, atol=1e-3)
    count = 1.0 + (torch.arange(50) % 2)
    twice = _fit(features.repeat_interleave(count.long(), 0), evidence.repeat_interleave(count.long(), 0))
    assert torch.allclose(_fit(features, evidence, count).weight, twice.weight, atol=1e-3)


def test_what_other_terms_say_is_taken_off() -> None:
    """An offset that explains the categories leaves nothing for them."""
    features, evidence = _people(300, 3)
    offset = 4.0 * features[:, :2]
    found = fit_relevance(GroupEvidence(features, offset, evidence, torch.ones(300)), FIELD)
    assert found.weight.abs().max() < 0.5 < _fit(features, evidence).weight.abs().max()


def test_a_clean_partition_stays_finite() -> None:
    features = torch.cat([torch.eye(3).double().repeat(20, 1), torch.zeros(60, 1).double()], dim=1)
    evidence = 100.0 * torch.eye(3, 2).double().repeat(20, 1)
    found = _fit(features, evidence)
    assert bool(torch.isfinite(found.weight).all()) and bool((found.precision >= WIDEST).all())
    assert _log_weights(found, features).exp()[0, 0] > 0.9
