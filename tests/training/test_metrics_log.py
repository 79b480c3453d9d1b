"""Figures of the log: sums over batches add up, experts are weighed by their responsibilities, K=1 is TRL's figures."""

from __future__ import annotations

import math

import pytest
import torch

from prefmix.mixture.elbo import elbo_rows
from prefmix.mixture.estep import EStep
from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.metrics_log import Meter, Sums, batch_sums
from prefmix.training.objective import likelihoods

WEIGHT = torch.tensor([1.0, 2.0, 0.5])
CHOSEN, REJECTED = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 0])


def sums_of(rows: torch.Tensor, resp: torch.Tensor) -> Sums:
    generator = torch.Generator().manual_seed(0)
    log_probs, ref = (-30 + torch.randn(4, 2, generator=generator) for _ in range(2))
    output = MixtureOutput(log_probs, ref, torch.tensor([0.25, 0.75]).log().expand(len(rows), 2))
    batch = {"chosen": CHOSEN[rows], "rejected": REJECTED[rows]}
    lik = likelihoods(output, batch, beta=torch.tensor([0.1, 0.5]), model=FeedbackModel())
    q = EStep(resp[rows], resp[rows].log())
    group_weight = torch.ones(len(rows))
    bound = elbo_rows(lik.log_lik, output.log_weights, q.resp, q.log_q, WEIGHT[rows], group_weight)
    return batch_sums(output, lik, q, bound, lik.log_lik, WEIGHT[rows], group_weight, CHOSEN[rows], REJECTED[rows])


RESP = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])


def test_two_batches_give_the_figures_of_one() -> None:
    split, whole = Meter(), Meter()
    split.add(sums_of(torch.tensor([0]), RESP))
    split.add(sums_of(torch.tensor([1, 2]), RESP))
    whole.add(sums_of(torch.arange(3), RESP))
    one, two = whole.pop(), split.pop()
    assert one == pytest.approx(two)
    assert split.pop() == {}
    assert one["mixture/usage_0"] == pytest.approx((0.9 + 1.0) / 3.5)
    assert one["mixture/elbo"] < one["mixture/evidence"]
    assert one["mixture/gate_entropy"] == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_an_unused_expert_has_no_mean() -> None:
    meter = Meter()
    meter.add(sums_of(torch.arange(3), torch.tensor([[1.0, 0.0]] * 3)))
    logs = meter.pop()
    assert "mixture/rewards/margins_0" in logs and "mixture/rewards/margins_1" not in logs
    assert logs["rewards/margins"] == pytest.approx(logs["mixture/rewards/margins_0"])
    assert all(math.isfinite(value) for value in logs.values())


def test_state_comes_back() -> None:
    meter, again = Meter(), Meter()
    meter.add(sums_of(torch.arange(3), RESP))
    again.load_state_dict(meter.state_dict(), torch.device("cpu"))
    assert again.pop() == meter.pop()
    again.load_state_dict({}, torch.device("cpu"))
    assert again.pop() == {}
