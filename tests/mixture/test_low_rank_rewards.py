"""Low-rank rewards: the gradient at the optimum, recovery of planted blends, K = 1 as ridge regression, new users."""

from __future__ import annotations

import pytest
import torch

from prefmix.mixture.linear_em import ProbeData, newton_step
from prefmix.mixture.low_rank_rewards import (
    LowRankRewards,
    fit_low_rank_rewards,
    fit_users,
    penalised_log_lik,
    user_margins,
)


def planted(users: int, each: int, seed: int = 0) -> tuple[ProbeData, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = 3.0 * torch.eye(2, 5, dtype=torch.float64)
    shares = torch.rand(users, 1, generator=generator, dtype=torch.float64)
    weights = torch.cat([shares, 1 - shares], dim=1)
    group = torch.arange(users).repeat_interleave(each)
    difference = torch.randn(users * each, 5, generator=generator, dtype=torch.float64)
    margin = (weights[group] * (difference @ rewards.T)).sum(dim=1)
    flip = torch.rand(len(margin), generator=generator, dtype=torch.float64) > torch.sigmoid(margin)
    difference = torch.where(flip.unsqueeze(1), -difference, difference)
    return ProbeData(difference, group, torch.ones(len(margin), dtype=torch.float64), users), rewards, weights


def test_one_reward_is_ridge_logistic_regression() -> None:
    data, _, _ = planted(10, 20)
    fit = fit_low_rank_rewards(data, 1, ridge=2.0)
    newton = torch.zeros(1, 1, 5, dtype=torch.float64)
    for _ in range(30):
        newton = newton_step(data, torch.ones(1, 10, 1, dtype=torch.float64), newton, torch.tensor([2.0]))
    torch.testing.assert_close(fit.model.coefficients, newton[0], atol=1e-5, rtol=1e-4)
    assert float(fit.user_logits.abs().max()) < 1e-4


def test_the_fit_is_stationary_and_never_below_its_start() -> None:
    data, _, _ = planted(12, 15)
    fit = fit_low_rank_rewards(data, 2, ridge=1.0, max_steps=2000)
    parts = [part.clone().requires_grad_() for part in (fit.model.coefficients, fit.model.logits, fit.user_logits)]
    value = penalised_log_lik(data, LowRankRewards(parts[0], parts[1], 4.0), parts[2], 1.0)
    assert value.item() == pytest.approx(fit.objective)
    for gradient in torch.autograd.grad(value, parts):
        assert float(gradient.abs().max()) < 0.05  # of a sum over 180 rows


def test_blends_of_known_and_new_users_are_recovered() -> None:
    data, _, weights = planted(150, 60)
    fit = fit_low_rank_rewards(data, 2, ridge=0.5)
    first, second = fit.model.coefficients[:, 0], fit.model.coefficients[:, 1]
    order = [0, 1] if first[0] - second[0] > first[1] - second[1] else [1, 0]
    found = torch.softmax(fit.model.logits + fit.user_logits, dim=1)[:, order]
    assert float(torch.corrcoef(torch.stack([found[:, 0], weights[:, 0]]))[0, 1]) > 0.8
    fresh, rewards, truth = planted(40, 60, seed=1)
    logits = fit_users(fit.model, fresh)
    own = user_margins(fit.model, fresh.difference, logits[fresh.group])
    exact = (truth[fresh.group] * (fresh.difference @ rewards.T)).sum(dim=1)
    alike = user_margins(fit.model, fresh.difference, torch.zeros_like(logits)[fresh.group])
    assert float((own - exact).square().mean()) < 0.6 * float((alike - exact).square().mean())


def test_users_who_show_nothing_weigh_as_the_population() -> None:
    model = LowRankRewards(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 4.0)
    nothing = ProbeData(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0), 3)
    assert torch.equal(fit_users(model, nothing), torch.zeros(3, 2, dtype=torch.float64))
    by_hand = user_margins(model, torch.tensor([[2.0, 4.0]]), torch.tensor([[0.0, 0.0]]))
    torch.testing.assert_close(by_hand, torch.tensor([3.0], dtype=torch.float64))
