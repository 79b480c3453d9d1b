"""The running table: equal to full sums, blind to unvisited rows, exact after any number of steps, resumable."""

import pytest
import torch

from prefmix.mixture.posterior import group_log_lik
from prefmix.mixture.user_evidence import UserEvidence

ROWS, EXPERTS, GROUPS = 40, 3, 6


def _table(seed=0):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, GROUPS - 1, (ROWS,), generator=generator)
    weight = torch.rand(ROWS, generator=generator) + 0.5
    return UserEvidence(ROWS, EXPERTS, group, weight, GROUPS, per_pair=False), group, weight


def test_unvisited_rows_carry_no_evidence():
    evidence, group, weight = _table()
    rows = torch.tensor([3, 17])
    log_lik = torch.randn(2, EXPERTS)
    result = evidence.update(rows, log_lik)
    expected = group_log_lik(log_lik, group[rows], GROUPS, weight[rows])
    torch.testing.assert_close(evidence.group_evidence(), expected)
    torch.testing.assert_close(result, expected[group[rows]])
    assert evidence.visited.nonzero().flatten().tolist() == [3, 17]


def test_after_an_epoch_it_is_the_full_sum_whatever_the_order():
    evidence, group, weight = _table()
    log_lik = torch.randn(ROWS, EXPERTS)
    for rows in torch.randperm(ROWS).split(7):
        evidence.update(rows, log_lik[rows])
    torch.testing.assert_close(evidence.group_evidence(), group_log_lik(log_lik, group, GROUPS, weight))


def test_a_revisited_row_replaces_its_evidence():
    evidence, group, weight = _table()
    evidence.update(torch.tensor([5]), torch.full((1, EXPERTS), -100.0))
    result = evidence.update(torch.tensor([5]), torch.full((1, EXPERTS), -1.0))
    torch.testing.assert_close(result, -weight[5].expand(1, EXPERTS))


def test_sums_do_not_drift_over_many_steps_of_very_different_size():
    evidence, group, weight = _table()
    generator = torch.Generator().manual_seed(1)
    for step in range(2000):
        rows = torch.randperm(ROWS, generator=generator)[:5]
        size = 1e4 if step % 2 else 1e-3
        result = evidence.update(rows, -size * torch.rand(5, EXPERTS, generator=generator))
    exact = torch.zeros(GROUPS, EXPERTS, dtype=torch.float64)
    exact.index_add_(0, group, evidence.table.double() * weight.double().unsqueeze(1))
    assert torch.equal(result, exact[group[rows]].float())
    assert torch.equal(evidence.group_evidence(), exact.float())


def test_a_resumed_table_goes_on_bit_for_bit():
    evidence, _, _ = _table()
    evidence.update(torch.arange(20), torch.randn(20, EXPERTS))
    resumed, _, _ = _table()
    resumed.load_state_dict(evidence.state_dict())
    rows, log_lik = torch.arange(10, 30), torch.randn(20, EXPERTS)
    assert torch.equal(resumed.update(rows, log_lik), evidence.update(rows, log_lik))
    assert torch.equal(resumed.visited, evidence.visited)


def test_a_saved_state_does_not_follow_later_updates():
    evidence, _, _ = _table()
    state = evidence.state_dict()
    evidence.update(torch.arange(3), torch.ones(3, EXPERTS))
    assert not state["visited"].any() and not state["table"].any()


def test_another_data_set_is_refused():
    evidence, _, _ = _table()
    other = UserEvidence(2, EXPERTS, torch.zeros(2, dtype=torch.int64), torch.ones(2), 1, per_pair=False)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(40, 3\)"):
        evidence.load_state_dict(other.state_dict())


def test_groups_of_one_need_no_table_and_no_weight():
    evidence = UserEvidence(ROWS, EXPERTS, torch.arange(ROWS), torch.full((ROWS,), 3.0), ROWS, per_pair=True)
    log_lik = torch.randn(4, EXPERTS, requires_grad=True)
    result = evidence.update(torch.tensor([1, 2, 3, 4]), log_lik)
    assert torch.equal(result, log_lik) and not result.requires_grad
    assert evidence.table.numel() == 0
    evidence.load_state_dict(evidence.state_dict())


def test_memory_is_four_bytes_an_expert_and_row():
    evidence, _, _ = _table()
    assert evidence.table.dtype == torch.float32 and evidence.table.numel() == ROWS * EXPERTS
