"""Continuous groups against Gauss-Hermite quadrature, finite differences, and the cases that reduce to other models."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.membership import (
    COMBINATIONS,
    GaussianQ,
    Membership,
    MembershipRows,
    active_units,
    free_bits,
    importance_bound,
    initial_loading,
    kl_factor,
    kl_to_prior,
    log_importance,
    membership_elbo_rows,
    membership_log_weights,
    mixture_rows,
    predictive_log_weights,
    resample,
    rows_log_lik,
    sample_z,
    standard_draws,
)
from prefmix.mixture.posterior import posterior

USERS, EXPERTS = 4, 3
NODES = 60


class Problem:
    """Users with 0 to 6 comparisons, random gate, loading, margins and q, float64."""

    def __init__(self, seed: int, dim: int, combine: str) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.combine = combine
        self.user = torch.tensor([1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3])
        self.margins = 2 * draw(len(self.user), EXPERTS)
        self.weight = torch.rand(len(self.user), generator=generator, dtype=torch.float64) + 0.2
        self.gate = draw(len(self.user), EXPERTS)
        self.loading = 1.5 * draw(EXPERTS, dim)
        # Wider than the posterior, so that importance weights are bounded.
        self.q = GaussianQ(0.3 * draw(USERS, dim), 0.1 * draw(USERS, dim).abs())

    def rows(self, margins=None, gate=None):
        margins = self.margins if margins is None else margins
        gate = self.gate if gate is None else gate
        score = preference_log_lik(margins) if self.combine == "mixture" else margins
        return MembershipRows(gate.log_softmax(-1), score, self.user, self.weight, USERS)

    def probability(self, z):
        """[B] by the definition in the module's head, for one z per user [G, d]."""
        weights = (self.gate.log_softmax(-1) + z[self.user] @ self.loading.T).softmax(-1)
        if self.combine == "mixture":
            return (weights * self.margins.sigmoid()).sum(-1)
        return (weights * self.margins).sum(-1).sigmoid()

    def log_evidence(self):
        """[G] log E_z prod_i p_i^a_i by Gauss-Hermite quadrature."""
        nodes, masses = np.polynomial.hermite_e.hermegauss(NODES)
        masses = masses / masses.sum()
        total = torch.zeros(USERS, dtype=torch.float64)
        for index in itertools.product(range(NODES), repeat=self.loading.shape[1]):
            z = torch.from_numpy(nodes[list(index)]).expand(USERS, -1)
            log_lik = torch.zeros(USERS, dtype=torch.float64)
            log_lik.index_add_(0, self.user, self.weight * self.probability(z).log())
            total += masses[list(index)].prod() * log_lik.exp()
        return total.log()

    def log_importance(self, noise):
        z = sample_z(self.q, noise)
        rows = self.rows()
        return log_importance(rows_log_lik(rows, self.loading, z, self.combine), rows, self.q, z)


CASES = pytest.mark.parametrize(("dim", "combine"), [(1, "mixture"), (1, "log_linear"), (2, "mixture")])
BOTH = pytest.mark.parametrize("combine", COMBINATIONS)


@CASES
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_below_the_evidence_and_the_importance_weighted_one_reaches_it(seed, dim, combine):
    problem = Problem(seed, dim, combine)
    evidence = problem.log_evidence()
    importance = problem.log_importance(standard_draws(2**14, dim).unsqueeze(1))
    assert (importance.mean(dim=0) <= evidence + 1e-3).all()
    assert (importance.mean(dim=0) < evidence - 1e-3)[1:].any()  # q is not the posterior here
    torch.testing.assert_close(importance_bound(importance), evidence, atol=5e-3, rtol=0)


def test_the_importance_weighted_bound_grows_with_its_draws():
    problem = Problem(0, 1, "mixture")
    noise = torch.randn(2**16, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    importance = problem.log_importance(noise)
    bounds = []
    for size in (1, 4, 32, 1024):
        pieces = importance.split(size)
        bounds.append(torch.stack([importance_bound(piece) for piece in pieces]).mean(dim=0))
    for looser, tighter in itertools.pairwise(bounds):
        assert (looser <= tighter + 1e-9)[[0, 3]].all()
    torch.testing.assert_close(bounds[-1], problem.log_evidence(), atol=2e-3, rtol=0)


def test_a_gaussian_posterior_makes_the_bound_exact():
    """Without rows the posterior is the prior; there bound, importance-weighted bound and evidence are 0."""
    problem = Problem(0, 2, "mixture")
    problem.q = GaussianQ(torch.zeros(USERS, 2).double(), torch.zeros(USERS, 2).double())
    importance = problem.log_importance(standard_draws(8, 2).unsqueeze(1))
    torch.testing.assert_close(importance[:, 0], torch.zeros(8, dtype=torch.float64))


@BOTH
def test_row_bounds_sum_to_the_users_bounds_over_any_batches(combine):
    problem = Problem(1, 2, combine)
    noise = standard_draws(64, 2).unsqueeze(1)
    rows, z = problem.rows(), sample_z(problem.q, noise)
    log_lik = rows_log_lik(rows, problem.loading, z, combine)
    total = torch.zeros(USERS, dtype=torch.float64).index_add(0, problem.user, problem.weight)
    kl = kl_to_prior(problem.q).sum(-1)
    whole = problem.log_importance(noise)
    # With symmetric draws the entropy part of log importance averages to the KL up to the draws' second moment.
    exact = log_lik.mean(0) * problem.weight
    expected = torch.zeros(USERS, dtype=torch.float64).index_add(0, problem.user, exact) - kl
    batches = torch.randperm(len(problem.user), generator=torch.Generator().manual_seed(0)).split(4)
    summed = sum(
        membership_elbo_rows(log_lik[:, b], kl[problem.user[b]], problem.weight[b], total[problem.user[b]]).elbo.sum()
        for b in batches
    )
    torch.testing.assert_close(summed, expected[1:].sum())
    torch.testing.assert_close(whole.mean(0), expected, atol=0.1, rtol=0)


@BOTH
def test_the_gradient_agrees_with_finite_differences_under_common_draws(combine):
    problem = Problem(2, 2, combine)
    noise = standard_draws(4, 2).unsqueeze(1)

    def bound(mean, log_std, loading, margins, gate):
        q, rows = GaussianQ(mean, log_std), problem.rows(margins, gate)
        log_lik = rows_log_lik(rows, loading, sample_z(q, noise), combine)
        kl = kl_to_prior(q).sum(-1)
        total = torch.zeros(USERS, dtype=torch.float64).index_add(0, problem.user, problem.weight)
        user = problem.user
        return membership_elbo_rows(log_lik, kl[user], problem.weight, total[user], 0.7).elbo.sum()

    inputs = (*problem.q, problem.loading, problem.margins, problem.gate)
    assert torch.autograd.gradcheck(bound, tuple(t.clone().requires_grad_() for t in inputs))


@BOTH
def test_the_importance_weighted_gradient_agrees_with_finite_differences(combine):
    problem = Problem(3, 1, combine)
    noise = standard_draws(8, 1).unsqueeze(1)

    def bound(mean, log_std):
        problem.q = GaussianQ(mean, log_std)
        return importance_bound(problem.log_importance(noise)).sum()

    assert torch.autograd.gradcheck(bound, tuple(t.clone().requires_grad_() for t in problem.q))


@pytest.mark.parametrize("dim", [0, 2])
def test_without_a_loading_it_is_a_pair_latent_with_the_gate(dim):
    problem = Problem(4, dim, "mixture")
    problem.loading = torch.zeros(EXPERTS, dim, dtype=torch.float64)
    rows = problem.rows()
    log_lik = rows_log_lik(rows, problem.loading, sample_z(problem.q, standard_draws(2, dim).unsqueeze(1)), "mixture")
    pair = posterior(rows.gate_log_weights, rows.score).log_evidence
    torch.testing.assert_close(log_lik, pair.expand(2, -1))
    q = problem.q.select(problem.user)
    torch.testing.assert_close(
        predictive_log_weights(rows.gate_log_weights, problem.loading, q, standard_draws(4, dim)), rows.gate_log_weights
    )


@BOTH
def test_weight_two_is_the_row_twice(combine):
    problem = Problem(5, 2, combine)
    noise = standard_draws(16, 2).unsqueeze(1)
    problem.weight[3] = 2.0
    heavy = problem.log_importance(noise)
    problem.weight[3] = 1.0
    again = torch.tensor([*range(len(problem.user)), 3])
    for name in ("user", "margins", "weight", "gate"):
        setattr(problem, name, getattr(problem, name)[again])
    torch.testing.assert_close(problem.log_importance(noise), heavy)


@BOTH
def test_permuting_experts_changes_nothing(combine):
    problem = Problem(6, 2, combine)
    noise, order = standard_draws(16, 2).unsqueeze(1), torch.tensor([2, 0, 1])
    straight = problem.log_importance(noise)
    gate, user = problem.gate.log_softmax(-1), problem.user
    weights = predictive_log_weights(gate, problem.loading, problem.q.select(user), standard_draws(16, 2))
    problem.gate, problem.margins = problem.gate[:, order], problem.margins[:, order]
    problem.loading = problem.loading[order]
    torch.testing.assert_close(problem.log_importance(noise), straight)
    permuted = predictive_log_weights(gate[:, order], problem.loading, problem.q.select(user), standard_draws(16, 2))
    torch.testing.assert_close(permuted, weights[:, order])


def test_a_common_shift_of_the_loading_changes_nothing():
    problem = Problem(7, 2, "mixture")
    noise = standard_draws(16, 2).unsqueeze(1)
    straight = problem.log_importance(noise)
    problem.loading = problem.loading + torch.tensor([[3.0, -2.0]])
    torch.testing.assert_close(problem.log_importance(noise), straight)


@settings(deadline=None, max_examples=20)
@given(size=st.sampled_from([-1e4, -30.0, 30.0, 1e4]), combine=st.sampled_from(COMBINATIONS))
def test_extreme_margins_stay_finite_in_float32(size, combine):
    margins = torch.tensor([[size, -size, 0.0]], requires_grad=True)
    log_weights = membership_log_weights(torch.zeros(1, 3), torch.randn(3, 2), torch.randn(4, 1, 2))
    score = preference_log_lik(margins) if combine == "mixture" else margins
    rows = MembershipRows(torch.zeros(1, 3), score, torch.zeros(1, dtype=torch.long), torch.ones(1), 1)
    log_lik = rows_log_lik(rows, torch.randn(3, 2), torch.randn(4, 1, 2), combine)
    log_lik.sum().backward()
    assert torch.isfinite(log_lik).all() and torch.isfinite(margins.grad).all()
    torch.testing.assert_close(log_weights.exp().sum(-1), torch.ones(4, 1))


def test_weights_survive_likelihoods_of_minus_ten_thousand():
    log_weights = torch.tensor([[[0.25, 0.75]]]).log()
    value = mixture_rows(log_weights, torch.tensor([[-1e4, -1e4]]))
    difference = mixture_rows(log_weights, torch.tensor([[-1e4, -1.0001e4]])) - value
    assert difference.item() == pytest.approx(math.log(0.25 + 0.75 * math.exp(-1.0)), abs=2e-3)


def test_kl_is_torchs():
    q = GaussianQ(torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64))
    normal, prior = torch.distributions.Normal(q.mean, q.log_std.exp()), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(kl_to_prior(q), torch.distributions.kl_divergence(normal, prior))


def test_free_bits_stop_the_gradient_of_cheap_dimensions_only():
    kl = torch.tensor([[0.1, 2.0], [0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    left = free_bits(kl, 0.5)
    torch.testing.assert_close(left, torch.tensor([[0.5, 2.0], [0.5, 0.4]], dtype=torch.float64))
    left.sum().backward()
    torch.testing.assert_close(kl.grad, torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(free_bits(kl, 0.0), kl)


def test_the_kl_factor_rises_to_one_and_stays():
    assert [kl_factor(f, 0.5) for f in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert kl_factor(0.0, 0.0) == 1.0


def test_predictive_weights_are_the_expectation():
    problem = Problem(8, 1, "mixture")
    nodes, masses = np.polynomial.hermite_e.hermegauss(NODES)
    q = problem.q.select(problem.user)
    z = q.mean + q.log_std.exp() * torch.from_numpy(nodes).view(-1, 1, 1)
    weights = (problem.gate.log_softmax(-1) + z @ problem.loading.T).softmax(-1)
    exact = (torch.from_numpy(masses / masses.sum()).view(-1, 1, 1) * weights).sum(0)
    found = predictive_log_weights(problem.gate.log_softmax(-1), problem.loading, q, standard_draws(1024, 1)).exp()
    torch.testing.assert_close(found, exact, atol=2e-3, rtol=0)
    assert not torch.allclose(found, problem.gate.softmax(-1), atol=0.02)


def test_resampled_draws_have_the_posteriors_moments():
    problem = Problem(9, 1, "mixture")
    noise = torch.randn(20_000, USERS, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = sample_z(problem.q, noise)
    draws = resample(z, problem.log_importance(noise), 20_000, torch.Generator().manual_seed(1))
    nodes, masses = np.polynomial.hermite_e.hermegauss(NODES)
    log_lik = torch.stack([problem.probability(torch.full((USERS, 1), float(x)).double()).log() for x in nodes])
    by_user = torch.zeros(NODES, USERS, dtype=torch.float64).index_add(1, problem.user, log_lik * problem.weight)
    mass = (torch.from_numpy(masses).log().unsqueeze(1) + by_user).softmax(0)
    mean = (mass * torch.from_numpy(nodes).unsqueeze(1)).sum(0)
    torch.testing.assert_close(draws.mean(0).squeeze(1), mean, atol=0.05, rtol=0)


def test_fixed_draws_are_standard_and_symmetric():
    draws = standard_draws(256, 3)
    torch.testing.assert_close(draws.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(draws.T @ draws / 256, torch.eye(3, dtype=torch.float64), atol=0.05, rtol=0)
    assert torch.equal(draws, standard_draws(256, 3))


def test_active_units_count_the_dimensions_that_vary():
    mean = torch.tensor([[1.0, 0.01], [-1.0, -0.01]])
    report = active_units(mean)
    assert report.num_active == 1
    torch.testing.assert_close(report.variance, torch.tensor([1.0, 1e-4]))


def test_the_module_starts_at_the_prior_with_a_loading_of_the_asked_scale():
    membership = Membership(4, 2, 5, scale=1.5, seed=3)
    q = membership(torch.tensor([4, 0, 4]))
    assert torch.equal(kl_to_prior(q), torch.zeros(3, 2))
    loading = membership.loading
    assert loading.square().sum(1).mean().sqrt().item() == pytest.approx(1.5, rel=1e-5)
    torch.testing.assert_close(loading.sum(0), torch.zeros(2), atol=1e-6, rtol=0)
    assert torch.equal(loading, Membership(4, 2, 0, scale=1.5, seed=3).loading)
    assert initial_loading(1, 2).tolist() == [[0.0, 0.0]] and initial_loading(3, 0).shape == (3, 0)
