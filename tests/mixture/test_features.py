"""Principal directions: their spread, within-prompt variation only, the same map for new texts."""

import pytest
import torch

from prefmix.mixture.features import pool_features, project


def _states(n=200, d=10):
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(1, -2, d)
    return torch.randn(n, d, generator=generator) * scales + 5.0


def test_columns_have_zero_mean_unit_spread_and_no_correlation():
    features = pool_features(_states(), 4, spectrum_power=0.0).features
    torch.testing.assert_close(features.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.T @ features / 200, torch.eye(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_spread_is_a_power_of_the_states_spread_with_unit_mean_square(power):
    states = _states()
    spread = torch.linalg.svdvals(states - states.mean(0))[:4] ** power
    features = pool_features(states, 4, spectrum_power=power).features
    expected = spread / spread.square().mean().sqrt()
    torch.testing.assert_close(features.std(0, unbiased=False), expected, atol=1e-3, rtol=1e-3)


def test_directions_are_the_leading_ones():
    states = _states()
    directions = pool_features(states, 2).projector.directions
    _, _, expected = torch.linalg.svd(states - states.mean(0), full_matrices=False)
    unit = directions / directions.norm(dim=0)
    torch.testing.assert_close((expected[:2] @ unit).abs(), torch.eye(2), atol=1e-4, rtol=0)


def test_differences_between_prompts_do_not_choose_directions():
    states = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    prompt = torch.arange(100) // 2
    far = states.clone()
    far[:, 0] = 1000.0 * prompt
    directions = pool_features(far, 3, centre_by=prompt).projector.directions
    assert directions[0].abs().max() < 1e-3 * directions.abs().max()


def test_prompts_with_one_text_each_fall_back_to_all_variation():
    features = pool_features(_states(), 3, centre_by=torch.arange(200), spectrum_power=0.0).features
    torch.testing.assert_close(features.std(0, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)


def test_new_texts_go_through_the_same_map():
    states, lengths = _states(), torch.arange(1, 201)
    pooled = pool_features(states, 4, lengths)
    again = project(pooled.projector, states[:7], lengths[:7])
    torch.testing.assert_close(again, pooled.features[:7])
    torch.testing.assert_close(pooled.features[:, -1].std(unbiased=False), torch.tensor(1.0))


def test_no_more_directions_than_the_texts_span():
    states = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 8)
    pooled = pool_features(states, 5)
    assert pooled.features.shape == (50, 2) and torch.isfinite(pooled.features).all()


def test_equal_texts_give_finite_features():
    pooled = pool_features(torch.ones(5, 3), 2, torch.ones(5, dtype=torch.int64))
    assert torch.isfinite(pooled.features).all()
