"""EM's memory: denominators of the bound, the statistic of a global gate, and a state that comes back unchanged."""

from __future__ import annotations

import pytest
import torch

from prefmix.training.em_state import EMState

GROUP = torch.tensor([0, 0, 1, 3])  # group 2 is a user whose rows were all dropped
WEIGHT = torch.tensor([1.0, 3.0, 2.0, 0.5])
INITIAL = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [1.0, 0.0]])


def test_under_user_a_group_counts_once_and_its_kl_is_shared_by_weight() -> None:
    em = EMState(GROUP, WEIGHT, INITIAL, per_pair=False)
    assert em.group_weight.tolist() == [4.0, 2.0, 0.0, 0.5] and em.total_weight == 6.5
    mean = em.mean_resp()
    torch.testing.assert_close(mean.mean, torch.tensor([0.9 + 0.2 + 1.0, 0.1 + 0.8]) / 3)
    assert mean.num_groups == 3  # the user without rows has no say


def test_under_pair_a_weight_multiplies_the_whole_bound() -> None:
    em = EMState(torch.arange(4), WEIGHT, INITIAL, per_pair=True)
    assert em.group_weight.tolist() == [1.0] * 4
    mean = em.mean_resp()
    torch.testing.assert_close(mean.mean, (WEIGHT @ INITIAL) / 6.5)
    assert mean.num_groups == 6.5


def test_responsibilities_of_groups_outside_the_batch_stay() -> None:
    em = EMState(GROUP, WEIGHT, INITIAL, per_pair=False)
    em.remember(torch.tensor([0, 0]), torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log())
    torch.testing.assert_close(em.resp[0], torch.tensor([0.25, 0.75]))
    assert torch.equal(em.resp[1:], INITIAL[1:]) and torch.equal(em.initial, INITIAL)


def test_state_comes_back_bit_for_bit_and_only_into_the_same_run() -> None:
    em = EMState(GROUP, WEIGHT, INITIAL, per_pair=False)
    em.evidence.update(torch.tensor([0, 2]), torch.tensor([[-0.1, -2.0], [-1.0, -0.3]]))
    em.remember(torch.tensor([1]), torch.tensor([[-0.5, -0.9]]))
    again = EMState(GROUP, WEIGHT, torch.full_like(INITIAL, 0.5), per_pair=False)
    again.load_state_dict(em.state_dict())
    for name, tensor in em.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    smaller = EMState(GROUP[:3], WEIGHT[:3], INITIAL[:2], per_pair=False)
    with pytest.raises(ValueError, match="resume with the same training rows, latent and num_experts"):
        smaller.load_state_dict(em.state_dict())
