"""Each failure is reported where it is, and nowhere else."""

import math

import torch

from prefmix.mixture.collapse import duplicated_experts, dying_experts, find_collapse, undecided_posterior


def test_a_dying_expert_is_named_with_a_remedy():
    (warning,) = dying_experts(torch.tensor([0.6, 0.38, 0.02]))
    assert warning.experts == (2,) and "num_experts=2" in warning.message
    assert not dying_experts(torch.tensor([0.6, 0.36, 0.04]))


def test_copies_are_found_whatever_their_offset_and_opposites_are_not():
    m = torch.randn(50, generator=torch.Generator().manual_seed(0))
    margins = torch.stack([m, -m, m + 1.0, torch.randn(50, generator=torch.Generator().manual_seed(1))], dim=1)
    assert [w.experts for w in duplicated_experts(margins)] == [(0, 2)]


def test_untrained_experts_are_not_copies_yet():
    assert not duplicated_experts(torch.zeros(50, 4))
    assert not duplicated_experts(torch.ones(2, 4))


def test_an_undecided_posterior_is_reported_and_a_decided_one_is_not():
    log_weights = torch.full((5, 2), -math.log(2.0))
    assert undecided_posterior(log_weights, log_weights)[0].failure == "undecided"
    decided = torch.tensor([[0.0, -math.inf]] * 5)
    assert not undecided_posterior(decided, log_weights)


def test_one_expert_has_nothing_to_collapse():
    ones = torch.ones(10, 1)
    assert not find_collapse(torch.ones(1), ones, torch.zeros(10, 1), torch.zeros(10, 1))


def test_all_checks_together():
    margins = torch.randn(20, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    log_weights = torch.tensor([[0.99, 0.01]] * 20).log()
    found = find_collapse(torch.tensor([0.99, 0.01]), margins, log_weights, log_weights)
    assert [w.failure for w in found] == ["dying", "duplicated", "undecided"]
