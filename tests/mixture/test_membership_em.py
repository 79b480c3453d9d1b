"""Continuous groups with linear rewards, on users that blend experts: better than one expert a user, and than none."""

import pytest
import torch

from prefmix.mixture.linear_em import ProbeData, fit_linear_em
from prefmix.mixture.membership import GaussianQ, active_units, standard_draws
from prefmix.mixture.membership_em import fit_membership, linear_rows, membership_predict
from prefmix.mixture.membership_fit import fit_users
from prefmix.mixture.user_encoder import encode, fit_encoder

USERS, PER_USER, FEATURES, EXPERTS = 120, 24, 4, 3


class Simulated:
    """Dirichlet users over orthogonal linear experts, with fresh comparisons scored by their true probability."""

    def __init__(self, alpha, combine="mixture", seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        gamma = torch._standard_gamma(torch.full((2 * USERS, EXPERTS), alpha, dtype=torch.float64), generator=generator)
        self.weights = gamma / gamma.sum(1, keepdim=True)
        self.experts = 4.0 * torch.linalg.qr(draw(FEATURES, EXPERTS)).Q.T
        self.combine = combine
        user = torch.arange(2 * USERS).repeat_interleave(PER_USER)
        difference = draw(len(user), FEATURES)
        won = torch.rand(len(user), generator=generator, dtype=torch.float64) < self.probability(user, difference)
        difference = torch.where(won.unsqueeze(1), difference, -difference)
        known = user < USERS
        ones = torch.ones(int(known.sum()), dtype=torch.float64)
        self.train = ProbeData(difference[known], user[known], ones, USERS)
        self.new = ProbeData(difference[~known], user[~known] - USERS, ones, USERS)
        self.test_user = torch.arange(2 * USERS).repeat_interleave(40)
        self.test = draw(len(self.test_user), FEATURES)

    def probability(self, user, difference):
        margins = difference @ self.experts.T
        if self.combine == "mixture":
            return (self.weights[user] * margins.sigmoid()).sum(1)
        return (self.weights[user] * margins).sum(1).sigmoid()

    def accuracy(self, log_odds, rows):
        p = self.probability(self.test_user, self.test)[rows]
        return torch.where(log_odds > 0, p, 1 - p).mean().item()

    def known(self):
        return self.test_user < USERS

    def of_fit(self, model, q, rows, first=0):
        user = self.test_user[rows] - first
        return self.accuracy(membership_predict(model, self.test[rows], q.select(user)), rows)


@pytest.fixture(scope="module")
def blended():
    data = Simulated(alpha=1.0)
    return data, fit_membership(data.train, EXPERTS, 2, samples=8, max_steps=60)


def test_users_who_blend_are_served_better_than_by_one_type_each(blended):
    data, fit = blended
    known = data.known()
    discrete = fit_linear_em(data.train, EXPERTS, torch.ones(4), anneal=4.0, generator=torch.Generator().manual_seed(0))
    best = int(discrete.penalised.argmax())
    weights = discrete.log_resp[best].exp()[data.test_user[known]]
    p = (weights * (data.test[known] @ discrete.coefficients[best].T).sigmoid()).sum(1)
    of_types = data.accuracy(p - 0.5, known)
    nobody = fit_linear_em(data.train, 1, torch.ones(1), anneal=1.0, generator=torch.Generator())
    single = data.accuracy((data.test[known] @ nobody.coefficients[0].T)[:, 0], known)
    found = data.of_fit(fit.model, fit.q, known)
    assert found > of_types + 0.002 and of_types > single
    assert fit.elbo > float(discrete.log_evidence[best])
    assert active_units(fit.q.mean).num_active == 2


def test_a_new_user_is_served_by_a_fit_and_nearly_as_well_by_the_encoder(blended):
    data, fit = blended
    new = ~data.known()
    rows = linear_rows(fit.model, data.new)
    q = fit_users(rows, fit.model.loading, "mixture", standard_draws(8, 2)).q
    fitted = data.of_fit(fit.model, q, new, USERS)
    prior = GaussianQ(torch.zeros_like(q.mean), torch.zeros_like(q.mean))
    unknown = data.of_fit(fit.model, prior, new, USERS)
    train = linear_rows(fit.model, data.train)
    encoder = fit_encoder(train, train.score, fit.model.loading, "mixture", hidden=24, steps=120, users_per_step=60)
    encoded = data.of_fit(fit.model, encode(encoder, rows, rows.score), new, USERS)
    assert fitted > unknown + 0.02
    assert encoded > fitted - 0.02


def test_users_with_one_summed_reward_are_best_described_by_log_linear():
    data = Simulated(alpha=1.0, combine="log_linear", seed=1)
    known = data.known()
    fits = {
        combine: fit_membership(data.train, EXPERTS, 2, combine=combine, samples=8, max_steps=40)
        for combine in ("mixture", "log_linear")
    }
    assert fits["log_linear"].elbo > fits["mixture"].elbo + 5
    accuracy = {name: data.of_fit(fit.model, fit.q, known) for name, fit in fits.items()}
    # Both say who prefers what; summed margins say how surely, which the bound sees and accuracy does not.
    assert accuracy["log_linear"] > accuracy["mixture"] - 0.02


def test_equal_calls_give_equal_fits():
    data = Simulated(alpha=0.5, seed=2)
    first, second = (fit_membership(data.train, EXPERTS, 1, samples=2, max_steps=5) for _ in range(2))
    assert torch.equal(first.model.coefficients, second.model.coefficients) and torch.equal(first.q.mean, second.q.mean)


def test_without_dimensions_users_are_all_alike():
    data = Simulated(alpha=1.0, seed=3)
    fit = fit_membership(data.train, 2, 0, samples=2, max_steps=20)
    assert fit.q.mean.shape == (USERS, 0)
    known = data.known()
    log_odds = membership_predict(fit.model, data.test[known], fit.q.select(data.test_user[known]))
    gate = fit.model.gate_log_weights.exp()
    by_hand = (gate * (data.test[known] @ fit.model.coefficients.T).sigmoid()).sum(1)
    torch.testing.assert_close(log_odds.sigmoid(), by_hand)
