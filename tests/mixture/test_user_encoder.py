"""The encoder of users: what its form promises before any training, and what it learns on simulated users."""

import torch

from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.membership import (
    MembershipRows,
    kl_to_prior,
    membership_log_weights,
    rows_log_lik,
    sample_z,
    standard_draws,
)
from prefmix.mixture.membership_fit import fit_users
from prefmix.mixture.user_encoder import UserEncoder, comparison_features

EXPERTS, DIM = 3, 2
USER = torch.tensor([0, 0, 0, 2, 2, 2, 2, 3])


def _encoder(seed=0):
    torch.manual_seed(seed)
    encoder = UserEncoder(EXPERTS, DIM, hidden=16).double()
    for parameter in encoder.parameters():  # away from its start near the prior
        torch.nn.init.normal_(parameter, std=0.7)
    return encoder


def _features(seed=0, num=8):
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(num, EXPERTS, generator=generator, dtype=torch.float64).log_softmax(-1)
    return comparison_features(gate, preference_log_lik(2 * torch.randn(num, EXPERTS, generator=generator).double()))


def test_the_order_of_comparisons_does_not_matter():
    features, weight = _features(), torch.rand(len(USER), dtype=torch.float64) + 0.5
    encoder, order = _encoder(), torch.randperm(len(USER))
    first = encoder(features, USER, weight, 4)
    second = encoder(features[order], USER[order], weight[order], 4)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(first.mean[0], first.mean[2], atol=0.01)


def test_nobody_and_a_user_without_comparisons_get_the_prior():
    encoder = _encoder()
    q = encoder(_features(), USER, torch.ones(len(USER)).double(), 4)
    assert torch.equal(kl_to_prior(q)[1], torch.zeros(DIM).double())
    empty = encoder(_features(num=0), USER[:0], torch.ones(0).double(), 2)
    assert torch.equal(kl_to_prior(empty), torch.zeros(2, DIM).double())


def test_users_do_not_touch_each_other():
    encoder, features = _encoder(), _features()
    together = encoder(features, USER, torch.ones(len(USER)).double(), 4)
    mine = USER == 2
    alone = encoder(features[mine], torch.zeros(4, dtype=torch.long), torch.ones(4).double(), 1)
    torch.testing.assert_close(alone.mean[0], together.mean[2])


def test_weight_two_is_the_comparison_twice_and_weight_zero_none():
    encoder, features = _encoder(), _features()
    weight = torch.tensor([2.0, 0.0, 1.0, 1, 1, 1, 1, 1]).double()
    heavy = encoder(features, USER, weight, 4)
    again = torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])
    repeated = encoder(features[again], USER[again], torch.ones(8).double(), 4)
    for a, b in zip(heavy, repeated, strict=True):
        torch.testing.assert_close(a, b)


def test_no_posterior_is_wider_than_the_prior():
    q = _encoder(3)(_features(3), USER, torch.ones(len(USER)).double(), 4)
    assert (q.log_std <= 0).all()


def test_features_are_finite_at_extreme_margins_and_zero_weights():
    gate = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    features = comparison_features(gate, preference_log_lik(torch.tensor([[-1e4, 1e4, 0.0]])))
    assert torch.isfinite(features).all() and features.shape == (1, 9)


def _simulated(num_users, per_user, generator):
    """Users with z from the prior, comparisons from the model, fixed experts: rows and the loading."""
    loading = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    user = torch.arange(num_users).repeat_interleave(per_user)
    z = torch.randn(num_users, DIM, generator=generator)
    margins = 3 * torch.randn(len(user), EXPERTS, generator=generator)
    gate = torch.zeros(len(user), EXPERTS).log_softmax(-1)
    weights = membership_log_weights(gate, loading, z[user].unsqueeze(0))[0].exp()
    wins = torch.rand(len(user), generator=generator) < (weights * margins.sigmoid()).sum(-1)
    margins = torch.where(wins.unsqueeze(1), margins, -margins)
    return MembershipRows(gate, preference_log_lik(margins), user, torch.ones(len(user)), num_users), loading


def test_trained_on_simulated_users_it_comes_near_a_fit_and_narrows_with_comparisons():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    encoder = UserEncoder(EXPERTS, DIM, hidden=24)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)

    def bound(rows, loading, q):
        log_lik = rows_log_lik(rows, loading, sample_z(q, standard_draws(8, DIM).float().unsqueeze(1)), "mixture")
        return (log_lik.mean(0).sum() - kl_to_prior(q).sum()) / rows.num_users

    def encode(rows):
        features = comparison_features(rows.gate_log_weights, rows.score)
        return encoder(features, rows.user, rows.weight, rows.num_users)

    for step in range(200):
        rows, loading = _simulated(40, (2, 6, 12)[step % 3], generator)
        optimizer.zero_grad()
        (-bound(rows, loading, encode(rows))).backward()
        optimizer.step()
    widths = []
    for per_user in (2, 8, 24):
        rows, loading = _simulated(200, per_user, generator)
        with torch.no_grad():
            q = encode(rows)
            encoded = bound(rows, loading, q)
            prior = bound(rows, loading, encode(rows._replace(weight=torch.zeros(len(rows.user)))))
        fitted = bound(rows, loading, fit_users(rows, loading, "mixture", standard_draws(8, DIM)).q)
        assert encoded - prior > 0.7 * (fitted - prior)
        widths.append(q.log_std.mean().item())
    assert widths[0] > widths[1] > widths[2]
