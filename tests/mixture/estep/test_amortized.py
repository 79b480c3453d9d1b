"""The amortised E-step: a looser bound by exactly the gap it reports, with a right gradient, that training closes."""

import pytest
import torch

from prefmix.mixture.elbo import elbo_rows
from prefmix.mixture.estep.amortized import PosteriorNetwork, amortized
from prefmix.mixture.posterior import posterior

GROUPS, EXPERTS = 6, 3


def _groups(seed=0, num=GROUPS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    log_weights = torch.randn(num, EXPERTS, generator=generator, dtype=dtype).log_softmax(-1)
    return log_weights, -4 * torch.rand(num, EXPERTS, generator=generator, dtype=dtype)


def _bound(log_weights, log_lik, estep):
    ones = torch.ones(len(log_lik), dtype=log_lik.dtype)
    return elbo_rows(log_lik, log_weights, estep.resp, estep.log_q, ones, ones).elbo


def _network(seed=0):
    torch.manual_seed(seed)
    network = PosteriorNetwork(EXPERTS, hidden=16).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network


def test_the_bound_misses_the_evidence_by_the_gap():
    log_weights, log_lik = _groups()
    step = amortized(log_weights, log_lik, _network()(log_weights, log_lik))
    assert (step.gap > 1e-4).all()
    evidence = posterior(log_weights, log_lik).log_evidence
    torch.testing.assert_close(_bound(log_weights, log_lik, step.estep).detach() + step.gap, evidence)


def test_the_posteriors_logits_have_no_gap():
    log_weights, log_lik = _groups()
    step = amortized(log_weights, log_lik, log_weights + log_lik)
    torch.testing.assert_close(step.gap, torch.zeros(GROUPS, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_its_pathwise_gradient_agrees_with_finite_differences(temperature):
    log_weights, log_lik = _groups(1)

    def bound(logits):
        generator = torch.Generator().manual_seed(0)
        step = amortized(log_weights, log_lik, logits, temperature=temperature, generator=generator)
        return _bound(log_weights, log_lik, step.estep).sum()

    logits = torch.randn(GROUPS, EXPERTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bound, logits)


def test_samples_have_the_mean_q_when_cold():
    log_weights, log_lik = (t[:1].expand(40_000, -1) for t in _groups(2))
    logits = torch.tensor([[0.5, -1.0, 0.2]], dtype=torch.float64).expand(40_000, -1)
    sample = amortized(log_weights, log_lik, logits, temperature=0.02, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample.estep.resp.mean(0), logits[0].softmax(-1), atol=0.02, rtol=0)


def test_the_network_starts_at_the_gate_and_takes_no_gradient_to_experts():
    log_weights, log_lik = _groups(3)
    log_lik.requires_grad_()
    logits = PosteriorNetwork(EXPERTS).double()(log_weights, log_lik)
    torch.testing.assert_close(logits.softmax(-1), log_weights.exp())
    logits.sum().backward()
    assert log_lik.grad is None


def test_extreme_evidence_and_zero_weights_stay_finite():
    network = PosteriorNetwork(EXPERTS)
    log_weights = torch.tensor([[0.0, -torch.inf, -torch.inf], [-1.0, -1.0, -1.0]])
    logits = network(log_weights, torch.tensor([[-1e4, -1e4, 0.0], [0.0, -1e6, -3.0]]))
    assert torch.isfinite(logits).all()


def test_training_on_the_bound_closes_the_gap():
    torch.manual_seed(0)
    network = PosteriorNetwork(EXPERTS, hidden=32)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    held_out = _groups(99, num=500, dtype=torch.float32)
    before = amortized(*held_out, network(*held_out)).gap.mean()
    for step in range(300):
        log_weights, log_lik = _groups(step, num=128, dtype=torch.float32)
        estep = amortized(log_weights, log_lik, network(log_weights, log_lik)).estep
        optimizer.zero_grad()
        (-_bound(log_weights, log_lik, estep).mean()).backward()
        optimizer.step()
    after = amortized(*held_out, network(*held_out)).gap.mean()
    assert before > 0.2 and after < 0.02
