"""Spectral starts find tastes without features where users share pairs, and without shared pairs from features."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from prefmix.mixture.linear_em import ProbeData
from prefmix.mixture.spectral import MAX_PAIRS, sign_matrix, spectral_resp, summed_differences


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_signs_are_summed_over_users_and_lonely_pairs_are_left_out():
    chosen, rejected = torch.tensor([1, 0, 1, 2, 5]), torch.tensor([0, 1, 0, 3, 4])
    group = torch.tensor([0, 1, 1, 0, 2])
    signs = sign_matrix(chosen, rejected, group, 4)
    assert signs.tolist() == [[1.0], [0.0], [0.0], [0.0]]
    weight = torch.tensor([0.5, 1.0, 3.0, 1.0, 1.0])
    assert sign_matrix(chosen, rejected, group, 4, weight).tolist() == [[0.5], [2.0], [0.0], [0.0]]
    assert sign_matrix(chosen[3:], rejected[3:], group[3:], 3).shape == (3, 0)


def test_the_most_answered_pairs_stand_for_all():
    pairs = MAX_PAIRS + 50
    chosen, rejected = torch.arange(pairs).repeat(2), torch.arange(pairs).repeat(2) + pairs
    assert sign_matrix(chosen, rejected, torch.arange(2).repeat_interleave(pairs), 2).shape == (2, MAX_PAIRS)


@pytest.mark.parametrize("tastes", [2, 3])
def test_shared_pairs_suffice(tastes):
    """Users answer 40 common pairs by their taste's random preference, one answer in ten turned around."""
    true = torch.arange(60) % tastes
    likes = torch.rand(tastes, 40, generator=_generator(1)) < 0.5
    turned = torch.rand(60, 40, generator=_generator(2)) < 0.1
    wins = (likes[true] ^ turned).flatten()
    pair, group = torch.arange(40).repeat(60), torch.arange(60).repeat_interleave(40)
    chosen, rejected = torch.where(wins, pair, pair + 40), torch.where(wins, pair + 40, pair)
    resp = spectral_resp(sign_matrix(chosen, rejected, group, 60), tastes, _generator())
    assert adjusted_rand_score(true, resp.argmax(1)) == 1.0


def test_features_stand_in_for_shared_pairs():
    true = torch.arange(80) % 2
    group = torch.arange(80).repeat_interleave(12)
    taste = torch.tensor([[2.0, 0.0, 0.0, 0.0], [-2.0, 0.0, 0.0, 0.0]])
    difference = torch.randn(len(group), 4, generator=_generator())
    lost = torch.rand(len(group), generator=_generator(1)) > torch.sigmoid((difference * taste[true[group]]).sum(1))
    difference[lost] *= -1
    data = ProbeData(difference, group, torch.ones(len(group)), 80)
    assert adjusted_rand_score(true, spectral_resp(summed_differences(data), 2, _generator()).argmax(1)) > 0.9


def test_groups_that_said_nothing_are_undecided_and_rows_sum_to_one():
    matrix = torch.randn(10, 5, generator=_generator())
    matrix[3] = 0.0
    resp = spectral_resp(matrix, 3, _generator())
    torch.testing.assert_close(resp.sum(1), torch.ones(10))
    torch.testing.assert_close(resp[3], torch.full((3,), 1 / 3))
    for narrow in (matrix[:, :0], matrix[:2], matrix[:, :1]):
        found = spectral_resp(narrow, 3, _generator())
        assert found.shape == (len(narrow), 3) and torch.isfinite(found).all()
