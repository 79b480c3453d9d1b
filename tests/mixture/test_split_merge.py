"""Split and merge leaves the local optimum that it was made for, and never makes a fit worse."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from prefmix.mixture.linear_em import ProbeData, expectation, fit_linear_em
from prefmix.mixture.split_merge import candidates, keep_start, split_and_merge, split_halves

RIDGE = 1.0


def _three_groups(seed=0, users=30, rows=40):
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(users) % 3
    group = torch.arange(users).repeat_interleave(rows)
    taste = 3.0 * torch.eye(3, 4, dtype=torch.float64)
    difference = torch.randn(users * rows, 4, generator=generator, dtype=torch.float64)
    right = torch.sigmoid((difference * taste[true[group]]).sum(1))
    difference[torch.rand(len(right), generator=generator, dtype=torch.float64) > right] *= -1
    return ProbeData(difference, group, torch.ones(len(group), dtype=torch.float64), users), true


def _squeezed(data, true):
    """EM from the wrong start: groups 0 and 1 share one expert, group 2 is cut in two by chance."""
    half = torch.arange(data.num_groups) % 2
    expert = torch.where(true == 2, 1 + half, 0)
    resp = 0.98 * torch.eye(3, dtype=torch.float64)[expert] + 0.02 / 3
    return fit_linear_em(
        data, 3, torch.tensor([RIDGE]), anneal=1.0, anneal_steps=0, generator=torch.Generator().manual_seed(0),
        first_resp=resp[None],
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_a_squeezed_group_is_freed(seed):
    data, true = _three_groups(seed)
    stuck = _squeezed(data, true)
    freed = split_and_merge(data, stuck, RIDGE)
    assert adjusted_rand_score(true, stuck.log_resp[0].argmax(1)) < 0.8
    assert adjusted_rand_score(true, freed.log_resp[0].argmax(1)) > 0.9
    assert freed.penalised[0] > stuck.penalised[0] + 1.0


def test_reported_quantities_belong_to_the_returned_parameters():
    data, true = _three_groups()
    fit = split_and_merge(data, _squeezed(data, true), RIDGE)
    log_resp, evidence = expectation(data, fit.log_weights, fit.coefficients)
    torch.testing.assert_close(log_resp, fit.log_resp)
    torch.testing.assert_close(evidence, fit.log_evidence)


@pytest.mark.parametrize("experts", [1, 2, 3, 4])
def test_a_fit_never_gets_worse(experts):
    data, _ = _three_groups(users=12, rows=6)
    fit = fit_linear_em(
        data, experts, torch.full((3,), RIDGE), anneal=2.0, generator=torch.Generator().manual_seed(0), max_steps=40
    )
    better = split_and_merge(data, fit, RIDGE, rounds=2, max_steps=40)
    assert better.penalised.shape == (1,) and better.penalised[0] >= fit.penalised.max()
    if experts < 3:
        assert torch.equal(better.coefficients, keep_start(fit, int(fit.penalised.argmax())).coefficients)


def test_the_split_axis_parts_two_tastes_in_one_expert():
    data, true = _three_groups()
    together = (true < 2).double().unsqueeze(1)
    fit = fit_linear_em(
        data.select(true[data.group] < 2), 1, torch.tensor([RIDGE]), anneal=1.0, generator=torch.Generator()
    )
    side = split_halves(data, together, fit.coefficients[0])[:, 0] > 0
    assert adjusted_rand_score(true[true < 2], side[true < 2]) > 0.8


def test_candidates_never_split_what_they_merge_and_put_twins_first():
    resp = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 4 + [[0.0, 0.0, 1.0, 0.0]] * 4 + [[0.0, 0.0, 0.0, 1.0]] * 4)
    halves = torch.ones(12, 4)
    halves[:, 3] = 5.0
    found = candidates(resp, halves)
    assert found[0].merge == (0, 1) and found[0].split == 3
    assert all(candidate.split not in candidate.merge for candidate in found)
