"""Learnt label noise: the E- and M-step against enumeration and a grid, and figure 3: who answers at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from prefmix.mixture.annotator_noise import (
    BetaPrior,
    fit_noisy_linear_em,
    flip_probability,
    noisy_log_lik,
    update_noise,
)
from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.linear_em import ProbeData, fit_linear_em

F64 = torch.float64


def test_noise_of_a_row_is_the_noise_of_all_rows_and_flips_follow_bayes():
    margins = 3 * torch.randn(7, 2, dtype=F64)
    rate = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5], dtype=F64)
    rows = noisy_log_lik(margins, rate)
    for i, e in enumerate(rate[:-1].tolist()):
        torch.testing.assert_close(rows[i : i + 1], preference_log_lik(margins[i : i + 1], e))
    assert rows[-1].exp().tolist() == pytest.approx([0.5, 0.5])  # a random answer
    wrong = rate[:, None] * torch.sigmoid(-margins)
    torch.testing.assert_close(flip_probability(margins, rate), wrong / rows.exp())


def test_gradient_of_the_margin_and_extremes():
    rate = torch.tensor([0.0, 0.2, 0.5], dtype=F64)
    margins = torch.randn(3, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: noisy_log_lik(m, rate), (margins,))
    extreme = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, 0.0]], requires_grad=True)
    value = noisy_log_lik(extreme, rate)
    value.sum().backward()
    assert value.isfinite().all() and extreme.grad.isfinite().all()
    assert flip_probability(extreme, rate).isfinite().all()


def test_m_step_is_the_maximum_of_its_objective_on_a_grid():
    flipped = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.7], dtype=F64)
    weight, annotator = torch.tensor([1.0, 2, 1, 1, 1], dtype=F64), torch.tensor([0, 1, 1, 0, 0])
    prior = BetaPrior(1.5, 3.0)
    noise = update_noise(flipped, weight, annotator, 3, prior)
    grid = torch.linspace(1e-4, 0.5, 20001, dtype=F64)
    for u in range(3):
        mine = annotator == u
        flips, clean = (weight * flipped)[mine].sum(), (weight * (1 - flipped))[mine].sum()
        objective = flips * grid.log() + clean * torch.log1p(-grid) + prior.log_density(grid)
        assert noise[u].item() == pytest.approx(grid[objective.argmax()].item(), abs=1e-4)
    assert noise[1] == 0.5  # 0.9 and 0.8 flipped: at random, not the opposite


def test_prior_without_a_mode_is_refused():
    with pytest.raises(ValueError, match=r"Beta\(0.5, 2.0\)"):
        BetaPrior(0.5, 2.0).checked()


def _planted(seed: int, users: int = 120, rows: int = 20, held: int = 20, random_share: float = 0.3):
    """Two opposed-but-for-one-direction groups; the first `random_share` of users answer by a coin in training."""
    rng = np.random.default_rng(seed)
    truth = np.stack([c := rng.normal(size=8), np.concatenate([-c[:6], c[6:]])])
    truth *= 3.0 / np.linalg.norm(truth, axis=1, keepdims=True)
    group = np.arange(users) % 2
    user = np.repeat(np.arange(users), rows + held)
    difference = rng.normal(size=(len(user), 8))
    probability = 1 / (1 + np.exp(-(difference * truth[group[user]]).sum(1)))
    sign = np.where(rng.random(len(user)) < probability, 1.0, -1.0)
    coin = rng.permutation(users) < random_share * users
    train = np.tile(np.arange(rows + held) < rows, users)
    answered = np.where(coin[user], rng.choice([-1.0, 1.0], len(user)), sign)

    def data(labels: np.ndarray, kept: np.ndarray) -> ProbeData:
        signed = torch.from_numpy((difference * labels[:, None])[kept])
        return ProbeData(signed, torch.from_numpy(user[kept]), torch.ones(len(signed), dtype=F64), users)

    honest = ~train & ~coin[user]
    return data(answered, train), data(sign, train), data(sign, honest), coin


def _accuracy(log_resp: torch.Tensor, coefficients: torch.Tensor, held_out: ProbeData) -> float:
    chance = torch.sigmoid(held_out.difference @ coefficients.T)
    probability = (log_resp.exp()[held_out.group] * chance).sum(1)
    return float((probability > 0.5).double().mean())


def test_evidence_never_falls_and_without_noise_rates_are_small():
    _, clean, _, _ = _planted(0, users=40)
    fit = fit_noisy_linear_em(clean, clean.group, 40, 2, 1.0, prior=BetaPrior(1.0, 1.0), restarts=2)
    assert (fit.trace.diff() >= -1e-9 * fit.trace[-1].abs()).all()
    assert len(fit.trace) > 3
    everybody = fit_noisy_linear_em(clean, torch.zeros_like(clean.group), 1, 2, 1.0, restarts=2)
    assert everybody.noise.shape == (1,)
    assert everybody.noise.item() < 0.05


def test_one_rate_for_everybody_is_found():
    noisy, *_ = _planted(1, random_share=0.0)
    flip = torch.from_numpy(np.random.default_rng(5).random(len(noisy.group)) < 0.2)
    noisy = noisy._replace(difference=torch.where(flip[:, None], -noisy.difference, noisy.difference))
    fit = fit_noisy_linear_em(noisy, torch.zeros_like(noisy.group), 1, 2, 1.0, restarts=2)
    assert fit.noise.item() == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("seed", range(5))
def test_random_annotators_are_found_and_cost_the_honest_ones_little(seed):
    """Figure 3 of issue 4: 30% random annotators, at most 2 points lost, AUC at least 0.95 at 20 rows each."""
    noisy, clean, held_out, coin = _planted(seed)
    users = len(coin)
    fit = fit_noisy_linear_em(noisy, noisy.group, users, 2, 1.0, restarts=3)
    reference = fit_linear_em(
        clean, 2, torch.ones(3, dtype=F64), anneal=4.0, generator=torch.Generator().manual_seed(0)
    )
    best = int(reference.penalised.argmax())
    with_clean_rows = _accuracy(reference.log_resp[best], reference.coefficients[best], held_out)
    assert _accuracy(fit.log_resp, fit.coefficients, held_out) >= with_clean_rows - 0.02
    assert roc_auc_score(coin, fit.noise.numpy()) >= 0.95
