"""The Dirichlet density against scipy, and its MAP against random perturbations."""

import math

import pytest
import scipy.stats
import torch

from prefmix.mixture.priors import check_alpha, dirichlet_log_density, map_log_weights


def test_density_equals_scipy():
    concentration = torch.tensor([1.5, 2.0, 4.0], dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64)
    expected = [scipy.stats.dirichlet(concentration.numpy()).logpdf(w.numpy()) for w in weights]
    torch.testing.assert_close(
        dirichlet_log_density(weights.log(), concentration), torch.tensor(expected, dtype=torch.float64)
    )


def test_flat_prior_is_constant_and_has_no_nan_at_a_zero_weight():
    log_weights = torch.tensor([[0.0, -math.inf], [math.log(0.5), math.log(0.5)]], requires_grad=True)
    density = dirichlet_log_density(log_weights, torch.ones(2))
    density.sum().backward()
    torch.testing.assert_close(density, torch.zeros(2))
    torch.testing.assert_close(log_weights.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("alpha", [1.0, 1.3, 3.0])
def test_map_weights_maximise_expected_log_weights_plus_prior(alpha):
    counts = torch.tensor([7.0, 2.0, 0.5], dtype=torch.float64)
    concentration = torch.full((3,), alpha, dtype=torch.float64)

    def objective(log_weights):
        return (counts * log_weights).sum(-1) + dirichlet_log_density(log_weights, concentration)

    best = map_log_weights(counts, concentration)
    others = (best + 0.3 * torch.randn(1000, 3, dtype=torch.float64)).log_softmax(-1)
    assert best.exp().sum().item() == pytest.approx(1.0)
    assert (objective(best) >= objective(others)).all()


def test_without_any_count_the_weights_are_uniform():
    torch.testing.assert_close(map_log_weights(torch.zeros(4), torch.ones(4)).exp(), torch.full((4,), 0.25))


@pytest.mark.parametrize("alpha", [0.99, 0.0, -1.0, math.nan])
def test_alpha_below_one_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        check_alpha(alpha)
