"""The probe finds planted groups, repeats itself, and predicts what enumeration predicts."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from prefmix.mixture.probe import fit_probe, gain_over_one, probe_log_lik, probe_predict

TEXTS, FEATURES = 300, 16


def _planted(tastes, users, rows, seed=0):
    """Rows of users who alternate between tastes [K, P]."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(TEXTS, FEATURES, generator=generator)
    true = torch.arange(users) % len(tastes)
    group = torch.arange(users).repeat_interleave(rows)
    first = torch.randint(0, TEXTS, (users * rows,), generator=generator)
    second = (first + torch.randint(1, TEXTS, (users * rows,), generator=generator)) % TEXTS
    margin = ((features[first] - features[second]) * tastes[true[group]]).sum(1)
    wins = torch.rand(len(margin), generator=generator) < torch.sigmoid(margin)
    return features, torch.where(wins, first, second), torch.where(wins, second, first), group, true


def _tastes(num, size=2.0, seed=0):
    tastes = torch.randn(num, FEATURES, generator=torch.Generator().manual_seed(seed))
    return size * tastes / tastes.norm(dim=1, keepdim=True)


OPPOSED = torch.cat([_tastes(1), -_tastes(1)])


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(3))
def test_opposed_groups_are_found(seed):
    features, chosen, rejected, group, true = _planted(OPPOSED, 40, 16, seed)
    result = fit_probe(features, chosen, rejected, group, 40, 2, generator=_generator(seed))
    assert adjusted_rand_score(true, result.log_resp.argmax(1)) > 0.9
    cosine = torch.nn.functional.cosine_similarity(result.coefficients[:, None], OPPOSED[None], dim=-1)
    assert max(cosine.diagonal().min(), cosine.flip(1).diagonal().min()) > 0.9


def test_three_groups_are_found():
    features, chosen, rejected, group, true = _planted(_tastes(3, 3.0), 60, 16)
    result = fit_probe(features, chosen, rejected, group, 60, 3, generator=_generator())
    assert adjusted_rand_score(true, result.log_resp.argmax(1)) > 0.8


def test_groups_that_do_not_exist_give_no_better_predictions_than_one_expert():
    """Held-out rows of users who all share one taste are predicted no better with K = 2 than with K = 1."""
    features, chosen, rejected, group, _ = _planted(_tastes(1).repeat(2, 1), 40, 16)
    held_out = torch.arange(len(group)) % 4 == 0
    losses = []
    for experts in (1, 2):
        fit = fit_probe(features, chosen[~held_out], rejected[~held_out], group[~held_out], 40, experts)
        weights = fit.log_resp[group[held_out]]
        losses.append(
            -probe_predict(features, chosen[held_out], rejected[held_out], fit.coefficients, weights).log().mean()
        )
    assert losses[1] > losses[0] - 0.01


def test_the_same_seed_gives_the_same_answer():
    features, chosen, rejected, group, _ = _planted(OPPOSED, 10, 8)
    first, second = (fit_probe(features, chosen, rejected, group, 10, 2, generator=_generator(3)) for _ in range(2))
    assert torch.equal(first.log_resp, second.log_resp) and first.ridge == second.ridge


def test_the_best_start_is_kept_and_experts_come_by_weight():
    features, chosen, rejected, group, _ = _planted(_tastes(3), 30, 4)
    result = fit_probe(features, chosen, rejected, group, 30, 3, ridge=4.0, restarts=5)
    assert result.restart_evidences.shape == (5,) and result.restart_log_resp.shape == (5, 30, 3)
    assert result.penalised == pytest.approx(result.restart_evidences.max().item())
    assert result.log_weights.diff().max() <= 0
    torch.testing.assert_close(result.log_weights.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(result.log_resp.exp().sum(1), torch.ones(30))


def test_one_expert_is_a_single_start():
    features, chosen, rejected, group, _ = _planted(OPPOSED, 5, 4)
    result = fit_probe(features, chosen, rejected, group, 5, 1, ridge=4.0)
    assert result.restart_evidences.shape == (1,) and torch.equal(result.log_resp, torch.zeros(5, 1))


def test_users_without_comparisons_get_the_weights():
    features, chosen, rejected, group, _ = _planted(OPPOSED, 10, 8)
    result = fit_probe(features, chosen, rejected, group, 12, 2, ridge=4.0)
    torch.testing.assert_close(result.log_resp[10:], result.log_weights.expand(2, 2))


def test_order_of_rows_does_not_matter_at_a_given_ridge():
    features, chosen, rejected, group, _ = _planted(OPPOSED, 20, 8)
    features = features.double()
    order = torch.randperm(len(group), generator=_generator())
    first = fit_probe(features, chosen, rejected, group, 20, 2, ridge=4.0)
    second = fit_probe(features, chosen[order], rejected[order], group[order], 20, 2, ridge=4.0)
    torch.testing.assert_close(first.coefficients, second.coefficients, rtol=1e-6, atol=1e-8)


def test_prediction_is_the_weighted_mean_of_sigmoids():
    features = torch.randn(6, 4, dtype=torch.float64)
    chosen, rejected = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    coefficients, weights = torch.randn(2, 4, dtype=torch.float64), torch.tensor([[0.3, 0.7]] * 3, dtype=torch.float64)
    margin = (features[chosen] - features[rejected]) @ coefficients.T
    expected = (weights * torch.sigmoid(margin)).sum(1)
    torch.testing.assert_close(probe_predict(features, chosen, rejected, coefficients, weights.log()), expected)
    torch.testing.assert_close(probe_log_lik(features, chosen, rejected, coefficients), torch.sigmoid(margin).log())


def test_more_experts_than_groups_and_one_row_each_survive():
    features, chosen, rejected, _, _ = _planted(OPPOSED, 3, 1)
    result = fit_probe(features, chosen, rejected, torch.arange(3), 3, 5)
    assert all(torch.isfinite(torch.as_tensor(part)).all() for part in result)


def test_no_rows_and_broken_features_are_named():
    features, chosen, rejected, group, _ = _planted(OPPOSED, 3, 2)
    with pytest.raises(ValueError, match="no comparisons"):
        fit_probe(features, chosen[:0], rejected[:0], group[:0], 3, 2)
    features[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fit_probe(features, chosen, rejected, group, 3, 2)


def test_two_rows_a_user_do_not_leave_the_experts_equal():
    """Annealing over tiny groups ends at the saddle of equal experts; the fit must leave it."""
    features, chosen, rejected, group, _ = _planted(2.0 * OPPOSED, 400, 2)
    result = fit_probe(features, chosen, rejected, group, 400, 2, ridge=16.0, generator=_generator())
    cosine = torch.nn.functional.cosine_similarity(result.coefficients[0], result.coefficients[1], dim=0)
    assert cosine < -0.7


def test_opposed_groups_do_not_choose_the_largest_ridge():
    """One reward explains nothing here, so a ridge chosen with K = 1 would shrink both experts away."""
    features, chosen, rejected, group, _ = _planted(2.0 * OPPOSED, 40, 8)
    assert fit_probe(features, chosen, rejected, group, 40, 2, generator=_generator()).ridge < 256.0


def test_few_users_choose_their_ridge_on_held_out_rows():
    features, chosen, rejected, group, true = _planted(2.0 * OPPOSED, 6, 60)
    result = fit_probe(features, chosen, rejected, group, 6, 2, generator=_generator())
    assert result.ridge < 256.0 and adjusted_rand_score(true, result.log_resp.argmax(1)) == 1.0


def test_restarts_carry_the_names_of_the_best():
    """Three clear groups: every restart's column k is the best one's expert k."""
    features, chosen, rejected, group, _ = _planted(_tastes(3, 4.0), 45, 20)
    result = fit_probe(features, chosen, rejected, group, 45, 3, ridge=2.0, restarts=6, generator=_generator())
    good = result.restart_evidences > result.restart_evidences.max() - 1.0
    agreement = (result.restart_log_resp[good].argmax(2) == result.log_resp.argmax(1)).float().mean(1)
    assert good.sum() >= 2 and (agreement > 0.9).all()


def test_groups_that_share_most_of_their_taste_are_pooled_and_opposed_ones_are_not():
    shared = 6.0 * _tastes(1, 1.0, seed=1) + torch.cat([_tastes(1, 0.7), -_tastes(1, 0.7)])
    features, chosen, rejected, group, _ = _planted(shared, 60, 8)
    alike = fit_probe(features, chosen, rejected, group, 60, 2, ridge=0.1, pooling=None, generator=_generator())
    assert alike.pooling >= 16.0
    loose = fit_probe(features, chosen, rejected, group, 60, 2, ridge=0.1, generator=_generator())
    truth = shared.mean(dim=0)
    errors = [float((result.log_weights.exp() @ result.coefficients - truth).norm()) for result in (alike, loose)]
    assert errors[0] < errors[1]
    features, chosen, rejected, group, _ = _planted(2.0 * OPPOSED, 60, 8)
    opposed = fit_probe(features, chosen, rejected, group, 60, 2, ridge=1.0, pooling=None, generator=_generator())
    assert opposed.pooling <= 16.0
    assert fit_probe(features, chosen, rejected, group, 60, 1, ridge=1.0, pooling=None).pooling == 0.0


def test_held_out_groups_prefer_two_rewards_where_tastes_are_opposed_and_not_where_they_are_one():
    gains = []
    for tastes in (OPPOSED, _tastes(1)):
        features, *columns, _ = _planted(tastes, 60, 8)
        result = fit_probe(features, *columns, 60, 2, restarts=2, generator=_generator())
        gain = gain_over_one(result, features, *columns, generator=_generator())
        assert result.held_out is not None and (result.held_out < 0).all()
        gains.append(gain)
        alone = fit_probe(features, *columns, 60, 1, generator=_generator())
        assert alone.held_out is not None
        expected = (result.held_out - alone.held_out).mean()
        assert gain.mean == pytest.approx(float(expected), abs=1e-2), "the same folds"
    opposed, alike = gains
    assert opposed.z > 5 and opposed.mean > 1
    assert alike.z < 2
