"""A user's MAP weights against the objective itself: its gradient, an optimizer, and the gate's own prior."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from prefmix.mixture.gates import Gate, GateInputs
from prefmix.policy.personalization import map_offsets_of_users, map_user_offsets


def problem(seed, num=12, experts=3, same_gate=False):
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if same_gate else num
    gate = torch.randn(rows, experts, generator=generator, dtype=torch.float64).log_softmax(1).expand(num, -1)
    log_lik = 2 * torch.randn(num, experts, generator=generator, dtype=torch.float64)
    weight = torch.rand(num, generator=generator, dtype=torch.float64) + 0.5
    population = gate[0] if same_gate else torch.randn(experts, generator=generator, dtype=torch.float64).log_softmax(0)
    past = torch.rand(experts, generator=generator, dtype=torch.float64) + 0.2
    return gate, log_lik, weight, population, past


def objective(offsets, gate, log_lik, weight, population, past):
    rows = torch.logsumexp((gate + offsets).log_softmax(1) + log_lik, dim=1)
    return weight @ rows + past @ (population + offsets).log_softmax(0)


@pytest.mark.parametrize("seed", range(5))
def test_em_finds_what_an_optimizer_finds(seed):
    given = problem(seed)
    ours = map_user_offsets(*given)
    found = minimize(lambda b: -float(objective(torch.from_numpy(b), *given)), np.zeros(3), tol=1e-12)
    assert float(objective(ours, *given)) >= -found.fun - 1e-7
    b = ours.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(b, *given), b)
    assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_with_one_gate_for_all_rows_it_is_plain_em(seed):
    gate, log_lik, weight, population, past = problem(seed, same_gate=True)
    weights = (past / past.sum()).clone()
    for _ in range(5000):
        resp = (weights.log() + log_lik).softmax(1)
        weights = (weight @ resp + past) / (weight.sum() + past.sum())
    ours = (population + map_user_offsets(gate, log_lik, weight, population, past)).softmax(0)
    torch.testing.assert_close(ours, weights, atol=1e-6, rtol=0)


def test_the_prior_is_the_gates_own():
    """At the result the gradient of evidence + Gate.log_prior vanishes in the user's row: training would stay there."""
    gate = Gate(3, ["global", "user"], num_users=1, update="gradient").double()
    with torch.no_grad():
        gate.global_logits.copy_(torch.tensor([0.5, 0.0, -0.5]))
    log_lik = problem(1)[1]
    population = gate.population_log_weights().detach()
    past = gate.user_concentration().detach() - 1
    offsets = map_user_offsets(population.expand(12, -1), log_lik, torch.ones(12), population, past)
    gate.set_user_log_weights(0, population + offsets)
    log_weights = gate(GateInputs(torch.zeros(12, dtype=torch.long)))
    evidence = torch.logsumexp(log_weights + log_lik, dim=1).sum() + gate.log_prior()
    (gradient,) = torch.autograd.grad(evidence, gate.user)
    assert gradient.abs().max() < 1e-5


def test_no_comparisons_leave_the_prior():
    _, _, _, population, _ = problem(0)
    past = 3 * population.exp()
    empty = torch.zeros(0, 3)
    offsets = map_user_offsets(empty, empty, torch.zeros(0), population, past)
    torch.testing.assert_close((population + offsets).softmax(0), population.exp())


def test_many_users_at_once_are_each_alone():
    gate, log_lik, weight, population, _ = problem(3, num=20)
    user = torch.tensor([0, 2] * 10)  # user 1 has no comparison
    past = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2
    together = map_offsets_of_users(gate, log_lik, weight, user, population, past)
    for u in range(3):
        rows = user == u
        alone = map_user_offsets(gate[rows], log_lik[rows], weight[rows], population, past[u])
        torch.testing.assert_close(together[u], alone, atol=1e-6, rtol=0)
