"""Held-out losses are held out, and the paired gain counts pairs of texts, not rows."""

import math

import pytest
import torch

from prefmix.mixture.held_out import fit_linear, held_out_log_loss, paired_gain
from prefmix.mixture.linear_em import ProbeData

ONE_CLUSTER = torch.zeros(400, dtype=torch.int64)


def test_pure_noise_is_never_better_than_a_coin():
    difference = torch.randn(400, 30, generator=torch.Generator().manual_seed(0))
    loss = held_out_log_loss(difference, torch.arange(400), ONE_CLUSTER, torch.Generator().manual_seed(0))
    assert loss.mean() > math.log(2.0)
    fitted = fit_linear(ProbeData(difference, ONE_CLUSTER, torch.ones(400), 1), (4.0,))[0, 0]
    seen = torch.nn.functional.softplus(-(difference @ fitted))
    assert seen.mean() < math.log(2.0), "the fit itself does overfit, so the test can fail"


def test_a_real_preference_shows():
    difference = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    difference *= difference[:, :1].sign()
    pair = torch.arange(400)
    loss = held_out_log_loss(difference, pair, ONE_CLUSTER, torch.Generator().manual_seed(0))
    assert paired_gain(torch.full((400,), math.log(2.0)), loss, pair).z > 5


def test_repeating_rows_does_not_raise_z():
    first, second = torch.rand(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    once = paired_gain(first, second, torch.arange(50))
    repeated = paired_gain(first.repeat(9), second.repeat(9), torch.arange(50).repeat(9))
    assert repeated.z == pytest.approx(once.z) and repeated.mean == pytest.approx(once.mean)


def test_no_spread_gives_no_z():
    assert paired_gain(torch.ones(5), torch.zeros(5), torch.arange(5)).z == 0


def test_clusters_have_their_own_reward():
    difference = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    cluster = torch.arange(400) % 2
    difference *= (difference[:, 0] * (1 - 2 * cluster)).sign().unsqueeze(1)
    losses = [
        held_out_log_loss(difference, torch.arange(400), label, torch.Generator().manual_seed(0))
        for label in (ONE_CLUSTER, cluster)
    ]
    assert losses[0].mean() > 0.65 and losses[1].mean() < 0.4


def test_clusters_fitted_together_equal_clusters_fitted_apart():
    difference = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cluster, weight = torch.arange(60) % 3, torch.ones(60, dtype=torch.float64)
    together = fit_linear(ProbeData(difference, cluster, weight, 3))
    rows = cluster == 1
    alone = fit_linear(ProbeData(difference[rows], torch.zeros(20, dtype=torch.int64), weight[rows], 1))
    torch.testing.assert_close(together[:, 1], alone[:, 0])
