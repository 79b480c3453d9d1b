"""Cheap M-steps: the sampled one has the gradient of the whole one on average, the top one has not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.mixture.m_step import M_STEPS, every_expert, sampled_experts, top_experts, with_gradient_of

B, K, P = 3, 3, 4


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [B, P], parameters [K, P], responsibilities [B, K] and weights [B], all float64."""
    generator = torch.Generator().manual_seed(0)
    features, theta = torch.randn(B, P, generator=generator), torch.randn(K, P, generator=generator)
    resp = torch.softmax(2 * torch.randn(B, K, generator=generator).double(), dim=1)
    return features.double(), theta.double(), resp, torch.tensor([1.0, 0.5, 2.0]).double()


def gradient(coefficient: Tensor) -> Tensor:
    """Gradient [K, P] of an M-step in which row i teaches expert k with strength c_ik."""
    features, theta, _, weight = problem()
    theta.requires_grad_()
    bound = with_gradient_of(torch.zeros(B).double(), logsigmoid(features @ theta.T), coefficient, weight)
    (found,) = torch.autograd.grad(bound.sum(), theta)
    return found


@pytest.mark.parametrize("samples", [1, 2])
def test_the_mean_over_every_draw_is_the_whole_gradient(samples: int) -> None:
    """Enumeration: all K^(B S) outcomes with their probabilities."""
    *_, resp, _ = problem()
    mean, total = torch.zeros(K, P).double(), 0.0
    for outcome in itertools.product(range(K), repeat=B * samples):
        drawn = torch.tensor(outcome).view(B, samples)
        probability = resp.gather(1, drawn).prod().item()
        coefficient = torch.nn.functional.one_hot(drawn, K).double().mean(1)
        mean, total = mean + probability * gradient(coefficient), total + probability
    assert total == pytest.approx(1)
    torch.testing.assert_close(mean, gradient(resp))


@pytest.mark.parametrize("samples", [1, 3])
def test_the_mean_of_many_draws_is_within_four_standard_errors(samples: int) -> None:
    *_, resp, _ = problem()
    generator, exact = torch.Generator().manual_seed(1), gradient(resp)
    drawn = torch.stack([gradient(sampled_experts(resp, samples=samples, generator=generator)) for _ in range(2000)])
    error = drawn.std(0) / len(drawn) ** 0.5
    assert (error > 0).all()
    assert ((drawn.mean(0) - exact).abs() <= 4 * error).all()
    # The same yardstick sees the bias of the top expert.
    assert ((gradient(top_experts(resp, threshold=1.0)) - exact).abs() > 4 * error).any()


def test_draws_follow_the_responsibilities() -> None:
    resp = torch.tensor([[0.0, 0.7, 0.3], [1.0, 0.0, 0.0]]).repeat(20_000, 1)
    drawn = sampled_experts(resp, samples=2, generator=torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0.0, 0.5, 1.0}
    assert torch.equal(drawn.sum(1), torch.ones(len(drawn)))
    first, second = drawn[::2].mean(0), drawn[1::2].mean(0)
    torch.testing.assert_close(first, resp[0], atol=4 * (0.21 / 40_000) ** 0.5, rtol=0)
    assert first[0] == 0 and torch.equal(second, resp[1])


def test_one_expert_is_the_whole_m_step_under_every_choice() -> None:
    resp = torch.ones(5, 1)
    for m_step in M_STEPS.values():
        assert torch.equal(m_step(resp, samples=2, threshold=0.5, generator=None), resp)


def test_top_keeps_the_largest_and_what_reaches_the_threshold() -> None:
    resp = torch.tensor([[0.5, 0.3, 0.2], [0.34, 0.33, 0.33]])
    assert top_experts(resp, threshold=0.25).tolist() == [
        pytest.approx([0.5, 0.3, 0.0]),
        pytest.approx(resp[1].tolist()),
    ]
    assert top_experts(resp, threshold=1.0).tolist() == [pytest.approx([0.5, 0, 0]), pytest.approx([0.34, 0, 0])]
    assert torch.equal(top_experts(resp, threshold=0.0), every_expert(resp))


def test_the_value_is_the_bound_whoever_learns_and_silent_experts_stay_silent() -> None:
    bound = torch.tensor([-1.0, -2.0], requires_grad=True)
    log_lik = torch.tensor([[-1.0, -torch.inf], [-3.0, -4.0]], requires_grad=True)
    taught = with_gradient_of(bound, log_lik, torch.tensor([[1.0, 0.0], [0.25, 0.0]]), torch.tensor([1.0, 2.0]))
    assert taught.tolist() == [-1.0, -2.0]
    taught.sum().backward()
    assert log_lik.grad is not None and log_lik.grad.tolist() == [[1.0, 0.0], [0.5, 0.0]]
    assert bound.grad is not None and bound.grad.tolist() == [1.0, 1.0]


def test_not_a_number_is_left_to_the_guard() -> None:
    resp = torch.tensor([[float("nan"), float("nan")]])
    assert sampled_experts(resp, samples=1, generator=None).shape == (1, 2)
