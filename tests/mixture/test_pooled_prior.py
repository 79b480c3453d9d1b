"""Partial pooling of linear experts: what each end of the prior must be, its closed forms, and EM's monotone path."""

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
    spread,
)
from prefmix.mixture.membership_em import fit_membership
from prefmix.mixture.split_merge import split_and_merge

RIDGE, POOLING = 2.0, 5.0


def _data(seed=0, users=20, rows=12):
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(users).repeat_interleave(rows)
    taste = 2.0 * torch.tensor([[1.0, 0.0, 0.5], [-1.0, 1.0, 0.0]], dtype=torch.float64)
    difference = torch.randn(users * rows, 3, generator=generator, dtype=torch.float64)
    right = torch.sigmoid((difference * taste[group % 2]).sum(1))
    difference[torch.rand(len(right), generator=generator, dtype=torch.float64) > right] *= -1
    weight = torch.rand(len(right), generator=generator, dtype=torch.float64) + 0.5
    return ProbeData(difference, group, weight, users)


def _fit(data, experts, pooling, starts=4, ridge=RIDGE, **options):
    return fit_linear_em(
        data, experts, torch.full((starts,), ridge), generator=torch.Generator().manual_seed(0),
        pooling=None if pooling is None else torch.full((starts,), pooling), **{"anneal": 2.0} | options,
    )  # fmt: skip


def _soft_resp(data, experts=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, data.num_groups, experts, generator=generator, dtype=torch.float64).softmax(dim=-1)


def test_the_prior_is_that_of_a_shared_part_and_deviations():
    experts, features = 4, 3
    variance = POOLING / (experts * RIDGE * (RIDGE + POOLING))
    covariance = np.full((experts, experts), variance) + np.eye(experts) / (RIDGE + POOLING)
    c = np.random.default_rng(0).normal(size=(experts, features))
    expected = -0.5 * np.trace(c.T @ np.linalg.solve(covariance, c))
    ridge, pooling = torch.tensor([RIDGE]), torch.tensor([POOLING])
    found = log_prior(torch.zeros(1, experts), torch.from_numpy(c)[None], ridge, 1.0, pooling)
    assert float(found) == pytest.approx(expected)


def test_no_pooling_is_the_independent_fit():
    data = _data()
    independent, pooled = _fit(data, 3, None, max_steps=40), _fit(data, 3, 0.0, max_steps=40)
    torch.testing.assert_close(pooled.coefficients, independent.coefficients)
    torch.testing.assert_close(pooled.penalised, independent.penalised)


def test_boundless_pooling_is_one_reward_for_every_expert():
    data, experts = _data(), 3
    pooled = _fit(data, experts, 1e9, max_steps=100)
    single = _fit(data, 1, None, starts=1, ridge=experts * RIDGE, max_steps=100)
    expected = single.coefficients[0].expand(4, experts, -1)
    torch.testing.assert_close(pooled.coefficients, expected, atol=1e-6, rtol=1e-6)


def test_the_more_pooling_the_nearer_the_experts():
    data = _data()
    apart = [float(spread(_fit(data, 2, pooling).coefficients).max()) for pooling in (0.0, 4.0, 16.0)]
    assert apart[0] > 1.2 * apart[1] > 1.2 * apart[2] > 0


def test_one_expert_cannot_be_pooled():
    data = _data()
    torch.testing.assert_close(_fit(data, 1, 7.0).coefficients, _fit(data, 1, None).coefficients)


@pytest.mark.parametrize("pooling", [0.5, 50.0, 1e7])
def test_newton_steps_end_where_the_gradient_vanishes(pooling):
    data, strength = _data(), torch.full((2,), pooling, dtype=torch.float64)
    ridge, resp = torch.full((2,), RIDGE, dtype=torch.float64), _soft_resp(data)
    c = torch.zeros(2, 3, 3, dtype=torch.float64)
    for _ in range(15):
        c = newton_step(data, resp, c, ridge, strength)
    c.requires_grad_()
    margins = torch.einsum("bp,skp->skb", data.difference, c)
    taught = torch.nn.functional.logsigmoid(margins) * resp[:, data.group].transpose(1, 2) * data.weight
    prior = log_prior(torch.zeros(2, 3, dtype=torch.float64), c, ridge, 1.0, strength)
    (taught.sum() + prior.sum()).backward()
    assert float(c.grad.abs().max()) < 1e-6


def test_newton_steps_never_lower_the_objective_from_a_bad_start():
    data, resp = _data(), _soft_resp(_data())
    ridge, pooling = torch.full((2,), 1e-3, dtype=torch.float64), torch.full((2,), 3.0, dtype=torch.float64)
    c = 4.0 * torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def objective(c):
        log_lik = torch.nn.functional.logsigmoid(torch.einsum("bp,skp->skb", data.difference, c))
        taught = (log_lik * resp[:, data.group].transpose(1, 2) * data.weight).sum(dim=(1, 2))
        return taught + log_prior(torch.zeros(2, 3, dtype=torch.float64), c, ridge, 1.0, pooling)

    for _ in range(10):
        moved = newton_step(data, resp, c, ridge, pooling)
        assert (objective(moved) >= objective(c) - 1e-9).all()
        c = moved
    assert float(spread(c).max()) < 1.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pooling", [1.0, 100.0])
def test_em_is_monotone_at_any_pooling(seed, pooling):
    fit = _fit(_data(seed), 3, pooling, anneal=4.0, anneal_steps=5, tolerance=0.0, max_steps=60)
    assert (fit.trace[7:] - fit.trace[6:-1] > -1e-9).all()


def test_em_reaches_the_optimum_that_bfgs_finds():
    data = _data()
    d, group, weight = data.difference.numpy(), data.group.numpy(), data.weight.numpy()

    def negative(parameters):
        c, logits = parameters[:6].reshape(2, 3), parameters[6:]
        log_w = logits - logsumexp(logits)
        by_group = np.zeros((data.num_groups, 2))
        np.add.at(by_group, group, -np.logaddexp(0.0, -(d @ c.T)) * weight[:, None])
        prior = 0.5 * RIDGE * (c**2).sum() + 0.5 * POOLING * ((c - c.mean(0)) ** 2).sum()
        return -(logsumexp(by_group + log_w, axis=1).sum() - prior + (WEIGHT_CONCENTRATION - 1) * log_w.sum())

    rng = np.random.default_rng(0)
    best = min((minimize(negative, rng.normal(size=8), method="BFGS", options={"gtol": 1e-6}) for _ in range(6)),
               key=lambda run: run.fun)  # fmt: skip
    em = _fit(data, 2, POOLING, starts=6, tolerance=0.0, max_steps=1000)
    assert float(em.penalised.max()) == pytest.approx(-best.fun, abs=1e-6)


def test_split_and_merge_keeps_the_prior():
    data = _data(users=18)
    fit = _fit(data, 3, POOLING, max_steps=40)
    better = split_and_merge(data, fit, RIDGE, rounds=1, pooling=POOLING)
    _, evidence = expectation(data, better.log_weights, better.coefficients)
    ridge, pooling = (torch.tensor([value], dtype=torch.float64) for value in (RIDGE, POOLING))
    prior = log_prior(better.log_weights, better.coefficients, ridge, pooling=pooling)
    assert float(better.penalised) == pytest.approx(float(evidence + prior)) and better.penalised >= fit.penalised.max()


@pytest.mark.parametrize("combine", ["mixture", "log_linear"])
def test_continuous_groups_pool_their_rewards(combine):
    data = _data()
    options = {"ridge": RIDGE, "combine": combine, "samples": 4, "restarts": 2, "max_steps": 60}
    loose, tight, bound = (fit_membership(data, 2, 1, pooling=p, **options) for p in (0.0, 10.0, 1e6))
    apart = [float(spread(found.model.coefficients)) for found in (loose, tight, bound)]
    assert apart[0] > 1.5 * apart[1] > 1.5 * apart[2] and apart[2] < 1e-4
    again = fit_membership(data, 2, 1, **options)
    torch.testing.assert_close(again.model.coefficients, loose.model.coefficients)
