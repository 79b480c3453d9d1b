"""What the E-steps share and where they differ."""

import math
from functools import partial

import pytest
import torch

from prefmix.mixture.elbo import elbo_rows
from prefmix.mixture.estep import ESTEPS
from prefmix.mixture.estep.gumbel import gumbel
from prefmix.mixture.posterior import posterior

ALL = {**ESTEPS, "relaxed": partial(gumbel, hard=False)}


def _problem(num_groups=6, num_experts=3, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    log_weights = torch.randn(num_groups, num_experts, generator=generator, dtype=torch.float64).log_softmax(-1)
    return log_weights, -scale * torch.rand(num_groups, num_experts, generator=generator, dtype=torch.float64)


def _run(name, log_weights, log_lik, temperature=0.7):
    return ALL[name](log_weights, log_lik, temperature=temperature, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ALL)
def test_rows_sum_to_one_and_carry_no_gradient(name):
    log_weights, log_lik = _problem()
    result = _run(name, log_weights.requires_grad_(), log_lik.requires_grad_())
    torch.testing.assert_close(result.resp.sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(result.log_q.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    assert not result.resp.requires_grad and not result.log_q.requires_grad


@pytest.mark.parametrize("name", ALL)
def test_extremes_stay_clean(name):
    log_weights = torch.tensor([[0.0, -math.inf], [-0.7, -0.7]])
    log_lik = torch.tensor([[-1e4, -1.0], [-1e4, 1e4]])
    result = _run(name, log_weights, log_lik)
    torch.testing.assert_close(result.resp, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert not torch.isnan(result.log_q).any()


@pytest.mark.parametrize("name", ["exact", "hard", "annealed"])
def test_permuting_experts_permutes_the_responsibilities(name):
    log_weights, log_lik = _problem()
    order = torch.tensor([2, 0, 1])
    straight, permuted = _run(name, log_weights, log_lik), _run(name, log_weights[:, order], log_lik[:, order])
    torch.testing.assert_close(permuted.resp, straight.resp[:, order])


def test_exact_and_cold_annealed_are_the_posterior():
    log_weights, log_lik = _problem()
    expected = posterior(log_weights, log_lik).log_resp
    torch.testing.assert_close(_run("exact", log_weights, log_lik).log_q, expected)
    torch.testing.assert_close(_run("annealed", log_weights, log_lik, temperature=1.0).log_q, expected)


def test_annealed_is_a_power_of_the_posterior():
    log_weights, log_lik = _problem()
    power = posterior(log_weights, log_lik).log_resp.exp() ** (1 / 3.0)
    result = _run("annealed", log_weights, log_lik, temperature=3.0)
    torch.testing.assert_close(result.resp, power / power.sum(-1, keepdim=True))


def test_hard_is_the_most_probable_expert():
    log_weights, log_lik = _problem()
    result = _run("hard", log_weights, log_lik)
    assert torch.equal(result.resp.argmax(-1), posterior(log_weights, log_lik).log_resp.argmax(-1))
    assert torch.equal(result.log_q.exp(), result.resp)


@pytest.mark.parametrize("temperature", [0.1, 5.0])
def test_gumbel_samples_have_the_posterior_not_the_gate_as_their_mean(temperature):
    log_weights, log_lik = _problem(1, 3, scale=4.0)
    draws = 20_000
    result = _run("gumbel", log_weights.expand(draws, -1), log_lik.expand(draws, -1), temperature)
    q = posterior(log_weights, log_lik).log_resp.exp()[0]
    count = result.resp.sum(0)
    chi_square = ((count - draws * q) ** 2 / (draws * q)).sum().item()
    assert set(result.resp.unique().tolist()) == {0.0, 1.0}
    assert chi_square < 13.8, "two degrees of freedom: exceeded once in a thousand"
    assert (log_weights.exp()[0] - q).abs().max() > 0.1


def test_relaxed_samples_are_soft_and_harden_as_the_temperature_falls():
    log_weights, log_lik = _problem(200)
    warm = _run("relaxed", log_weights, log_lik, temperature=2.0).resp.amax(-1).mean()
    cold = _run("relaxed", log_weights, log_lik, temperature=0.01).resp.amax(-1).mean()
    assert warm < 0.9 and cold > 0.99


@pytest.mark.parametrize("name", ALL)
def test_no_responsibilities_beat_the_evidence(name):
    log_weights, log_lik = _problem(50, 4, scale=3.0)
    result = _run(name, log_weights, log_lik, temperature=2.0)
    ones = torch.ones(50, dtype=torch.float64)
    bound = elbo_rows(log_lik, log_weights, result.log_q.exp(), result.log_q, ones, ones).elbo
    evidence = posterior(log_weights, log_lik).log_evidence
    assert (bound <= evidence + 1e-12).all()
    if name in ("hard", "annealed"):
        assert (bound < evidence - 1e-6).any()
