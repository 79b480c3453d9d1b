"""Mixed logit against numerical integration and draws; its limits, symmetry and gradient; the spread that is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.likelihoods.feedback import pair_outcomes
from prefmix.mixture.likelihoods.mixed_logit import best_spread, mixed_logit_log_lik, normal_nodes
from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.training.options import validate_options

MARGINS = torch.tensor([[-8.0], [-1.3], [0.0], [0.4], [2.0], [9.0]], dtype=torch.float64)


def integral(margin: float, spread: float) -> float:
    def integrand(x: float) -> float:
        return norm.pdf(x) * expit(margin * np.exp(spread * x - 0.5 * spread**2))

    return float(np.log(quad(integrand, -12, 12, limit=400, epsabs=1e-13)[0]))


@pytest.mark.parametrize(("spread", "tolerance"), [(0.3, 1e-9), (1.0, 1e-5), (2.0, 1e-3)])
def test_equals_the_integral_over_a_log_normal_beta(spread: float, tolerance: float) -> None:
    found = mixed_logit_log_lik(MARGINS, spread)[:, 0]
    expected = torch.tensor([integral(float(m), spread) for m in MARGINS], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_equals_a_mixture_of_experts_that_differ_in_beta_alone() -> None:
    nodes = normal_nodes(8)
    each = preference_log_lik(MARGINS * torch.from_numpy(np.exp(0.7 * nodes.place - 0.245)))
    enumerated = torch.logsumexp(each + torch.from_numpy(nodes.log_weight), dim=1, keepdim=True)
    torch.testing.assert_close(mixed_logit_log_lik(MARGINS, 0.7, num_nodes=8), enumerated)


def test_no_spread_is_bradley_terry_and_a_small_one_is_near() -> None:
    plain = preference_log_lik(MARGINS, 0.1)
    assert torch.equal(mixed_logit_log_lik(MARGINS, 0.0, 0.1), plain)
    torch.testing.assert_close(mixed_logit_log_lik(MARGINS, 1e-4, 0.1), plain, atol=1e-6, rtol=0)


def test_is_a_probability_with_the_gradient_of_finite_differences() -> None:
    model = FeedbackModel(loss_type="mixed_logit", beta_spread=1.2, label_noise=0.05)
    outcomes = pair_outcomes(MARGINS, torch.ones(1), model)
    torch.testing.assert_close(outcomes.win.exp() + outcomes.loss.exp(), torch.ones_like(MARGINS))
    margins = MARGINS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: mixed_logit_log_lik(m, 1.2, 0.05), (margins,))
    huge = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    mixed_logit_log_lik(huge, 1.0).sum().backward()
    assert huge.grad is not None and huge.grad.isfinite().all()


def test_the_spread_is_no_scale() -> None:
    zero = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    slopes = [torch.autograd.grad(mixed_logit_log_lik(zero, s).sum(), zero)[0].item() for s in (0.0, 0.5, 1.5)]
    assert slopes == pytest.approx([0.5, 0.5, 0.5])


def test_rows_against_a_large_margin_pull_less_than_under_one_beta() -> None:
    margins = torch.full((1, 1), -6.0, dtype=torch.float64, requires_grad=True)
    mixed = torch.autograd.grad(mixed_logit_log_lik(margins, 1.5).sum(), margins)[0]
    plain = torch.autograd.grad(preference_log_lik(margins).sum(), margins)[0]
    assert 0 < float(mixed) < 0.5 * float(plain)


def test_the_spread_of_people_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    strength = torch.randn(60_000, 1, generator=generator, dtype=torch.float64)
    margins = 3.0 * torch.randn(60_000, 1, generator=generator, dtype=torch.float64)
    right = torch.rand(60_000, 1, generator=generator, dtype=torch.float64) < torch.sigmoid(
        margins * torch.exp(strength - 0.5)
    )
    observed = torch.where(right, margins, -margins)
    weight = torch.ones(60_000)
    assert best_spread(observed, weight) == pytest.approx(1.0, abs=0.15)
    one_beta = torch.where(torch.rand(60_000, 1, generator=generator) < torch.sigmoid(margins), margins, -margins)
    assert best_spread(one_beta, weight) <= 0.2


def test_options_that_mean_nothing_are_refused() -> None:
    validate_options({"loss_type": "mixed_logit", "beta_spread": 0.8, "label_noise": 0.1})
    for options, phrase in (
        ({"beta_spread": 0.8}, "use loss_type='mixed_logit'"),
        ({"loss_type": "mixed_logit", "beta_spread": -1.0}, "zero or more"),
        ({"loss_type": "mixed_logit", "ties": "davidson"}, "ties have a probability"),
        ({"loss_type": "mixed_logit", "likelihood": "bt_lse", "latent": "pair"}, "use 'sigmoid'"),
    ):
        with pytest.raises(ValueError, match=phrase.replace("(", "\\(")):
            validate_options(options)
    with pytest.raises(ValueError, match="standard deviation"):
        mixed_logit_log_lik(MARGINS, -0.1)
