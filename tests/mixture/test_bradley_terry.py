"""Rewards, margins and the Bradley-Terry likelihood against their definitions in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix.mixture.bradley_terry import (
    implicit_rewards,
    margins,
    margins_of_log_lik,
    mixture_log_lik,
    preference_log_lik,
)


def test_margins_are_differences_of_scaled_log_ratios():
    log_probs = torch.tensor([[-10.0, -12.0], [-11.0, -9.0], [-7.0, -8.0]])
    reference = torch.tensor([[-11.0, -11.0], [-11.0, -11.0], [-8.0, -8.0]])
    rewards = implicit_rewards(log_probs, reference, torch.tensor([0.1, 0.5]))
    torch.testing.assert_close(rewards, torch.tensor([[0.1, -0.5], [0.0, 1.0], [0.1, 0.0]]))
    result = margins(rewards, torch.tensor([0, 1]), torch.tensor([1, 2]))
    torch.testing.assert_close(result, torch.tensor([[0.1, -1.5], [-0.1, 1.0]]))


def test_half_precision_log_probs_give_float32_rewards():
    rewards = implicit_rewards(torch.zeros(2, 1).bfloat16(), torch.zeros(2, 1).bfloat16(), torch.ones(1))
    assert rewards.dtype == torch.float32


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.45])
def test_log_lik_is_the_log_of_the_mixture_of_right_and_flipped_labels(noise):
    m = torch.linspace(-8, 8, 33, dtype=torch.float64).unsqueeze(1)
    expected = ((1 - noise) * torch.sigmoid(m) + noise * torch.sigmoid(-m)).log()
    torch.testing.assert_close(preference_log_lik(m, noise), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_gradient_is_the_stated_one(noise):
    m = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    log_lik = preference_log_lik(m, noise)
    (gradient,) = torch.autograd.grad(log_lik.sum(), m)
    s = torch.sigmoid(m)
    torch.testing.assert_close(gradient, (1 - 2 * noise) * s * (1 - s) / log_lik.exp())


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_stay_finite(noise, dtype):
    m = torch.tensor([[1e4], [-1e4], [88.0], [-104.0], [0.0]], dtype=dtype, requires_grad=True)
    log_lik = preference_log_lik(m, noise)
    log_lik.sum().backward()
    assert torch.isfinite(log_lik).all() and torch.isfinite(m.grad).all()
    worst = -1e4 if noise == 0.0 else math.log(noise)
    assert log_lik[1].item() == pytest.approx(worst, rel=1e-6)
    assert log_lik[0].item() == pytest.approx(math.log1p(-noise), abs=1e-6)


@pytest.mark.parametrize("noise", [-0.1, 0.5, 1.0, math.nan])
def test_impossible_label_noise_is_named(noise):
    with pytest.raises(ValueError, match="label_noise"):
        preference_log_lik(torch.zeros(1, 1), noise)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), noise=st.sampled_from([0.0, 0.05, 0.3]))
def test_both_answers_have_probability_one_together(seed, noise):
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(4, 3, generator=generator, dtype=torch.float64) * 5
    log_weights = torch.randn(4, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    one = mixture_log_lik(log_weights, preference_log_lik(m, noise)).exp()
    other = mixture_log_lik(log_weights, preference_log_lik(-m, noise)).exp()
    torch.testing.assert_close(one + other, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "noise", "reach"), [
    (torch.float32, 0.0, 80.0), (torch.float64, 0.0, 600.0), (torch.float32, 0.1, 7.0), (torch.float64, 0.1, 25.0)
])  # fmt: skip
def test_margins_come_back_from_log_likelihoods(dtype, noise, reach):
    m = torch.linspace(-reach, reach, 41, dtype=dtype)[:, None]
    torch.testing.assert_close(margins_of_log_lik(preference_log_lik(m, noise), noise), m, rtol=1e-3, atol=1e-3)
    extreme = margins_of_log_lik(preference_log_lik(1e4 * torch.tensor([[-1.0, 1.0]], dtype=dtype), noise), noise)
    assert extreme.isfinite().all() and extreme[0, 0] < -10 and extreme[0, 1] > 10
