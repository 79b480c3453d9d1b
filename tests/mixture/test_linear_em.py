"""The probe's EM against an independent optimiser of an independent likelihood, and its monotone path."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp

from prefmix.mixture.linear_em import (
    WEIGHT_CONCENTRATION,
    ProbeData,
    expectation,
    fit_linear_em,
    log_prior,
    newton_step,
)

RIDGE = 2.0


def _data(seed=0, users=20, rows=12, features=3):
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(users).repeat_interleave(rows)
    taste = 2.0 * torch.tensor([[1.0, 0.0, 0.5], [-1.0, 1.0, 0.0]], dtype=torch.float64)[:, :features]
    difference = torch.randn(users * rows, features, generator=generator, dtype=torch.float64)
    right = torch.sigmoid((difference * taste[group % 2]).sum(1))
    flip = torch.rand(len(right), generator=generator, dtype=torch.float64) > right
    difference[flip] *= -1
    weight = torch.rand(len(right), generator=generator, dtype=torch.float64) + 0.5
    return ProbeData(difference, group, weight, users)


def _fit(data, experts=2, starts=6, **options):
    return fit_linear_em(
        data,
        experts,
        torch.full((starts,), RIDGE),
        anneal=options.pop("anneal", 2.0),
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def _negative_penalised_evidence(parameters, data, experts):
    """The same objective in numpy: marginal likelihood, ridge, Dirichlet; weights through softmax."""
    d, group, weight = data.difference.numpy(), data.group.numpy(), data.weight.numpy()
    c = parameters[: experts * d.shape[1]].reshape(experts, -1)
    logits = parameters[experts * d.shape[1] :]
    log_w = logits - logsumexp(logits)
    log_lik = -np.logaddexp(0.0, -(d @ c.T)) * weight[:, None]
    by_group = np.zeros((data.num_groups, experts))
    np.add.at(by_group, group, log_lik)
    evidence = logsumexp(by_group + log_w, axis=1).sum()
    return -(evidence - 0.5 * RIDGE * (c**2).sum() + (WEIGHT_CONCENTRATION - 1) * log_w.sum())


def test_em_reaches_the_optimum_that_bfgs_finds():
    data = _data()
    em = _fit(data, tolerance=0.0, max_steps=2000)
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=8) for _ in range(8)]
    runs = [
        minimize(_negative_penalised_evidence, x, args=(data, 2), method="BFGS", options={"gtol": 1e-6}) for x in starts
    ]
    best = min(runs, key=lambda run: run.fun)
    assert em.penalised.max().item() == pytest.approx(-best.fun, abs=1e-6)
    found = best.x[:6].reshape(2, 3)
    ours = em.coefficients[em.penalised.argmax()].numpy()
    assert min(np.abs(ours - found).max(), np.abs(ours[::-1] - found).max()) < 1e-4


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_once_the_temperature_is_one_the_objective_never_falls(seed, experts):
    fit = _fit(_data(seed), experts, anneal=4.0, anneal_steps=5, tolerance=0.0, max_steps=60)
    gains = fit.trace[7:] - fit.trace[6:-1]
    assert (gains > -1e-9).all()


def test_reported_quantities_belong_to_the_returned_parameters():
    data = _data()
    fit = _fit(data)
    log_resp, evidence = expectation(data, fit.log_weights, fit.coefficients)
    torch.testing.assert_close(log_resp, fit.log_resp)
    torch.testing.assert_close(evidence, fit.log_evidence)
    prior = log_prior(fit.log_weights, fit.coefficients, torch.full((6,), RIDGE, dtype=torch.float64))
    torch.testing.assert_close(evidence + prior, fit.penalised)


def test_newton_steps_converge_to_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    data = _data()
    both = np.concatenate([data.difference.numpy(), -data.difference.numpy()])
    sides = np.repeat([1, 0], len(data.difference))
    # Every row stands there as a win and as a loss of the opposite difference, so its ridge 1/C is halved.
    model = LogisticRegression(C=1 / (2 * RIDGE), fit_intercept=False, tol=1e-10)
    model.fit(both, sides, sample_weight=np.tile(data.weight.numpy(), 2))
    resp = torch.ones(1, data.num_groups, 1, dtype=torch.float64)
    coefficients = torch.zeros(1, 1, 3, dtype=torch.float64)
    for _ in range(20):
        coefficients = newton_step(data, resp, coefficients, torch.tensor([RIDGE], dtype=torch.float64))
    np.testing.assert_allclose(coefficients[0, 0].numpy(), model.coef_[0], rtol=1e-5)


def test_newton_steps_never_lower_the_objective_from_a_bad_start():
    data = _data()
    resp = torch.ones(1, data.num_groups, 1, dtype=torch.float64)
    ridge = torch.tensor([1e-3], dtype=torch.float64)
    coefficients = 50.0 * torch.ones(1, 1, 3, dtype=torch.float64)

    def objective(c):
        log_lik = torch.nn.functional.logsigmoid(data.difference @ c[0].T)[:, 0]
        return float((data.weight * log_lik).sum() - 0.5 * ridge * c.square().sum())

    for _ in range(10):
        moved = newton_step(data, resp, coefficients, ridge)
        assert objective(moved) >= objective(coefficients)
        coefficients = moved


def test_separable_rows_and_groups_without_rows_stay_finite():
    difference = torch.ones(6, 2)
    data = ProbeData(difference, torch.tensor([0, 0, 1, 1, 3, 3]), torch.ones(6), 5)
    fit = fit_linear_em(data, 3, torch.full((4,), 1e-2), anneal=4.0, generator=torch.Generator().manual_seed(0))
    assert all(torch.isfinite(t).all() for t in fit)
    torch.testing.assert_close(fit.log_resp[:, 2], fit.log_weights)
    torch.testing.assert_close(fit.log_resp[:, 4], fit.log_weights)
    torch.testing.assert_close(fit.log_resp.exp().sum(-1), torch.ones(4, 5))


def test_a_first_guess_is_used_and_rows_of_nan_are_drawn():
    data = _data()
    first = torch.full((2, data.num_groups, 2), torch.nan, dtype=torch.float64)
    drawn = _fit(data, starts=2, anneal=1.0, anneal_steps=0, max_steps=1)
    first[1] = drawn.log_resp.new_tensor([0.9, 0.1])
    given = _fit(data, starts=2, anneal=1.0, anneal_steps=0, max_steps=1, first_resp=first)
    torch.testing.assert_close(given.coefficients[0], drawn.coefficients[0])
    weights = torch.tensor([0.9, 0.1], dtype=torch.float64) * data.num_groups + 1.0
    torch.testing.assert_close(given.log_weights[1].exp(), weights / weights.sum())


def test_the_balance_prior_draws_weights_together():
    data = _data()
    spread = [_fit(data, 3, weight_concentration=a).log_weights.std(dim=1).mean() for a in (1.0, 2.0, 50.0)]
    assert spread[0] > spread[1] > spread[2]


@pytest.mark.parametrize("concentration", [1.0, 5.0])
def test_em_is_monotone_under_any_balance_prior(concentration):
    fit = _fit(_data(1), 3, anneal=1.0, anneal_steps=0, tolerance=0.0, max_steps=40, weight_concentration=concentration)
    assert (fit.trace[1:] - fit.trace[:-1] > -1e-9).all()
