"""Bayes' rule against enumeration, and facts 1, 3 and 6: gradients, identical experts, permutations, extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix.mixture.posterior import group_log_lik, kl_to_gate, posterior

PROBLEMS = given(
    seed=st.integers(0, 10**6),
    num_groups=st.integers(1, 6),
    num_experts=st.integers(1, 5),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)


def _problem(seed, num_groups, num_experts, scale):
    generator = torch.Generator().manual_seed(seed)
    log_lik = -scale * torch.rand(num_groups, num_experts, generator=generator, dtype=torch.float64)
    logits = torch.randn(num_groups, num_experts, generator=generator, dtype=torch.float64)
    return logits, log_lik


@settings(deadline=None)
@PROBLEMS
def test_posterior_is_bayes_rule(seed, num_groups, num_experts, scale):
    logits, log_lik = _problem(seed, num_groups, num_experts, scale)
    joint = logits.softmax(-1) * log_lik.exp()
    result = posterior(logits.log_softmax(-1), log_lik)
    torch.testing.assert_close(result.log_evidence, joint.sum(-1).log())
    torch.testing.assert_close(result.log_resp.exp(), joint / joint.sum(-1, keepdim=True))


@settings(deadline=None)
@PROBLEMS
def test_gradients_are_q_and_q_minus_w(seed, num_groups, num_experts, scale):
    logits, log_lik = (t.requires_grad_() for t in _problem(seed, num_groups, num_experts, scale))
    result = posterior(logits.log_softmax(-1), log_lik)
    by_logits, by_lik = torch.autograd.grad(result.log_evidence.sum(), (logits, log_lik))
    torch.testing.assert_close(by_lik, result.log_resp.exp())
    torch.testing.assert_close(by_logits, result.log_resp.exp() - logits.softmax(-1))


@settings(deadline=None)
@PROBLEMS
def test_permuting_experts_permutes_the_posterior(seed, num_groups, num_experts, scale):
    logits, log_lik = _problem(seed, num_groups, num_experts, scale)
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed))
    straight = posterior(logits.log_softmax(-1), log_lik)
    permuted = posterior(logits[:, order].log_softmax(-1), log_lik[:, order])
    torch.testing.assert_close(permuted.log_resp, straight.log_resp[:, order])
    torch.testing.assert_close(permuted.log_evidence, straight.log_evidence)


def test_identical_experts_give_the_gate():
    log_weights = torch.randn(5, 3, dtype=torch.float64).log_softmax(-1)
    log_lik = torch.randn(5, 1, dtype=torch.float64).expand(5, 3)
    torch.testing.assert_close(posterior(log_weights, log_lik).log_resp, log_weights)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), num_experts=st.integers(1, 8), size=st.sampled_from([1e2, 1e4, 1e6]))
def test_rows_sum_to_one_in_float32_at_extreme_log_likelihoods(seed, num_experts, size):
    generator = torch.Generator().manual_seed(seed)
    log_lik = size * (2 * torch.randint(0, 2, (7, num_experts), generator=generator).float() - 1)
    log_lik = (log_lik + torch.randn(7, num_experts, generator=generator)).requires_grad_()
    logits = torch.randn(7, num_experts, generator=generator).requires_grad_()
    result = posterior(logits.log_softmax(-1), log_lik)
    result.log_evidence.sum().backward()
    torch.testing.assert_close(result.log_resp.exp().sum(-1), torch.ones(7))
    assert torch.isfinite(log_lik.grad).all() and torch.isfinite(logits.grad).all()


def test_equal_extreme_log_likelihoods_do_not_swallow_the_weights():
    log_weights = torch.tensor([[0.7, 0.3]]).log()
    result = posterior(log_weights, torch.full((1, 2), -1e6))
    torch.testing.assert_close(result.log_resp, log_weights)


def test_bfloat16_is_computed_in_float32():
    result = posterior(torch.zeros(1, 2).log_softmax(-1).bfloat16(), torch.zeros(1, 2).bfloat16())
    assert result.log_resp.dtype == torch.float32


def test_a_weight_of_zero_keeps_gradients_finite():
    log_weights = torch.tensor([[0.0, -math.inf]], requires_grad=True)
    log_lik = torch.tensor([[-3.0, -0.1]], requires_grad=True)
    result = posterior(log_weights, log_lik)
    (result.log_evidence.sum() + kl_to_gate(result.log_resp, log_weights).sum()).backward()
    assert result.log_evidence.item() == pytest.approx(-3.0)
    torch.testing.assert_close(log_lik.grad, torch.tensor([[1.0, 0.0]]))
    assert not torch.isnan(log_weights.grad).any()


def test_group_sums_equal_a_loop_and_weights_go_inside():
    log_lik = torch.randn(6, 2, dtype=torch.float64)
    group, weight = torch.tensor([2, 0, 2, 2, 0, 4]), torch.rand(6, dtype=torch.float64)
    expected = torch.zeros(5, 2, dtype=torch.float64)
    for i in range(6):
        expected[group[i]] += weight[i] * log_lik[i]
    torch.testing.assert_close(group_log_lik(log_lik, group, 5, weight), expected)
    torch.testing.assert_close(group_log_lik(log_lik, group, 5), group_log_lik(log_lik, group, 5, torch.ones(6)))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_of_rows_does_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    log_lik = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    group, order = torch.randint(0, 4, (12,), generator=generator), torch.randperm(12, generator=generator)
    torch.testing.assert_close(group_log_lik(log_lik[order], group[order], 4), group_log_lik(log_lik, group, 4))


def test_kl_is_the_sum_and_its_gradient_in_the_gate_is_w_minus_q():
    q = torch.rand(4, 3, dtype=torch.float64).softmax(-1)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    kl = kl_to_gate(q.log(), logits.log_softmax(-1))
    torch.testing.assert_close(kl, (q * (q.log() - logits.log_softmax(-1))).sum(-1))
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    torch.testing.assert_close(gradient, logits.softmax(-1) - q)


def test_kl_of_hard_responsibilities_has_no_nan():
    log_q = torch.tensor([[0.0, -math.inf], [0.0, -1e4], [-math.inf, 0.0]], requires_grad=True)
    logits = torch.tensor([[0.2, -0.5], [0.0, -math.inf], [0.0, 1.0]], requires_grad=True)
    kl = kl_to_gate(log_q, logits.log_softmax(-1))
    kl.sum().backward()
    torch.testing.assert_close(kl[0], -logits.log_softmax(-1)[0, 0].detach())
    assert kl[1] == 0
    assert torch.isfinite(kl).all() and torch.isfinite(log_q.grad).all() and torch.isfinite(logits.grad).all()


def test_kl_is_infinite_where_the_gate_forbids_what_q_believes():
    assert kl_to_gate(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, -math.inf]])).item() == math.inf
