"""The stochastic algorithm arrives where full-batch EM does, from the same start; with steps that do not decay, not."""

from __future__ import annotations

import math

import pytest
import torch

from prefmix.mixture.linear_em import ProbeData, expectation, log_prior, newton_step
from prefmix.mixture.priors import map_log_weights
from prefmix.mixture.stochastic_em import Steps, stochastic_linear_em

RIDGE = torch.tensor([2.0], dtype=torch.float64)


def _problem(seed: int, users: int = 30, rows: int = 8, experts: int = 2) -> tuple[ProbeData, torch.Tensor]:
    """Users of alternating tastes, weighted rows, and first responsibilities with little to say."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    tastes = 2.0 * torch.randn(experts, 3, **options)
    group = torch.arange(users).repeat_interleave(rows)
    difference = torch.randn(users * rows, 3, **options)
    right = torch.sigmoid((difference * tastes[group % experts]).sum(1))
    difference[torch.rand(len(right), **options) > right] *= -1
    resp = torch.softmax(torch.randn(users, experts, **options), dim=1)
    return ProbeData(difference, group, torch.rand(len(group), **options) + 0.5, users), resp


def _start(data: ProbeData, resp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One M-step from the first responsibilities: weights [K], coefficients [K, P]."""
    zero = data.difference.new_zeros(1, resp.shape[1], data.difference.shape[1])
    prior = resp.new_full((resp.shape[1],), 2.0)
    return map_log_weights(resp.sum(0), prior), newton_step(data, resp[None], zero, RIDGE)[0]


def _objective(data: ProbeData, log_weights: torch.Tensor, coefficients: torch.Tensor) -> float:
    """Evidence + log prior, nats for a unit of row weight."""
    _, evidence = expectation(data, log_weights[None], coefficients[None])
    return float((evidence + log_prior(log_weights[None], coefficients[None], RIDGE)) / data.weight.sum())


def _full_batch(data: ProbeData, log_weights: torch.Tensor, coefficients: torch.Tensor) -> float:
    """Plain EM to the end: exact E-steps, one safeguarded Newton step an M-step."""
    log_w, c, last = log_weights[None], coefficients[None], -math.inf
    prior = log_weights.new_full(log_weights.shape, 2.0)
    for _ in range(2000):
        log_resp, _ = expectation(data, log_w, c)
        c, log_w = newton_step(data, log_resp.exp(), c, RIDGE), map_log_weights(log_resp.exp().sum(1), prior)
        now = _objective(data, log_w[0], c[0])
        assert now >= last - 1e-12
        if now - last < 1e-10:
            break
        last = now
    return now


@pytest.mark.parametrize("seed", range(20))
def test_decaying_minibatch_steps_come_within_a_thousandth_of_a_nat_of_full_batch_em(seed: int) -> None:
    data, resp = _problem(seed)
    start = _start(data, resp)
    full = _full_batch(data, *start)
    found = stochastic_linear_em(data, *start, float(RIDGE), generator=torch.Generator().manual_seed(seed))
    assert _objective(data, *found) == pytest.approx(full, abs=1e-3)
    assert _objective(data, *start) < full - 1e-2, "the start must leave something to do"


def test_three_experts() -> None:
    data, resp = _problem(100, users=60, experts=3)
    start = _start(data, resp)
    found = stochastic_linear_em(data, *start, float(RIDGE), generator=torch.Generator().manual_seed(0))
    assert _objective(data, *found) == pytest.approx(_full_batch(data, *start), abs=1e-3)


def test_steps_that_do_not_decay_stay_away_from_the_optimum() -> None:
    """What the condition on the steps is for: the same algorithm with a constant step fails the bound above."""
    data, resp = _problem(0)
    start = _start(data, resp)
    constant = Steps(batch_size=4, epochs=10, first=2.0, decay=math.inf)
    found = stochastic_linear_em(data, *start, float(RIDGE), generator=torch.Generator().manual_seed(0), steps=constant)
    assert _objective(data, *found) < _full_batch(data, *start) - 1e-3


def test_one_expert_is_logistic_regression_by_stochastic_gradient() -> None:
    data, _ = _problem(3)
    start = _start(data, torch.ones(data.num_groups, 1, dtype=torch.float64))
    found = stochastic_linear_em(data, *start, float(RIDGE), generator=torch.Generator().manual_seed(0))
    assert found.log_weights.tolist() == [0.0]
    assert _objective(data, *found) == pytest.approx(_full_batch(data, *start), abs=1e-3)
