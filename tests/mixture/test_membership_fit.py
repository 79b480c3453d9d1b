"""The E-step of continuous groups: against a generic optimiser, quadrature, and its own promises."""

import numpy as np
import pytest
import torch

from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.membership import (
    COMBINATIONS,
    GaussianQ,
    MembershipRows,
    kl_to_prior,
    rows_log_lik,
    sample_z,
    standard_draws,
)
from prefmix.mixture.membership_fit import fit_users

EXPERTS, DIM = 3, 2
BOTH = pytest.mark.parametrize("combine", COMBINATIONS)


def _problem(combine, counts=(0, 1, 5, 20), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    user = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    margins = 2.0 * torch.randn(len(user), EXPERTS, generator=generator, dtype=dtype)
    gate = 0.5 * torch.randn(EXPERTS, generator=generator, dtype=dtype)
    loading = 1.5 * torch.randn(EXPERTS, DIM, generator=generator, dtype=dtype)
    score = preference_log_lik(margins) if combine == "mixture" else margins
    weight = torch.rand(len(user), generator=generator, dtype=dtype) + 0.5
    gate = gate.log_softmax(-1).expand(len(user), -1)
    return MembershipRows(gate, score, user, weight, len(counts)), loading


def _bound(rows, loading, combine, noise, mean, log_std):
    q = GaussianQ(mean, log_std)
    log_lik = rows_log_lik(rows, loading, sample_z(q, noise.unsqueeze(1)), combine).mean(0) * rows.weight
    return torch.zeros(rows.num_users, dtype=mean.dtype).index_add(0, rows.user, log_lik) - kl_to_prior(q).sum(-1)


@BOTH
@pytest.mark.parametrize("seed", range(2))
def test_it_ends_where_a_generic_optimiser_does(combine, seed):
    (rows, loading), noise = _problem(combine, seed=seed), standard_draws(32, DIM)
    fit = fit_users(rows, loading, combine, noise, steps=150, tolerance=1e-11)
    mean, log_std = (t.clone().requires_grad_() for t in fit.q)
    optimizer = torch.optim.LBFGS([mean, log_std], max_iter=100, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -_bound(rows, loading, combine, noise, mean, log_std).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = _bound(rows, loading, combine, noise, mean, log_std)
    torch.testing.assert_close(fit.elbo, best.detach(), atol=1e-5, rtol=0)


@BOTH
def test_every_step_raises_every_users_bound(combine):
    (rows, loading), noise = _problem(combine, seed=4), standard_draws(8, DIM)
    last = _bound(rows, loading, combine, noise, *[torch.zeros(4, DIM, dtype=torch.float64)] * 2)
    for steps in range(1, 15):
        fit = fit_users(rows, loading, combine, noise, steps=steps, tolerance=0.0)
        assert (fit.elbo >= last - 1e-12).all()
        torch.testing.assert_close(fit.elbo, _bound(rows, loading, combine, noise, *fit.q))
        last = fit.elbo


def test_a_user_without_comparisons_keeps_the_prior_and_comparisons_narrow_it():
    rows, loading = _problem("log_linear", counts=(0, 4, 16, 64))
    q = fit_users(rows, loading, "log_linear", standard_draws(32, DIM)).q
    torch.testing.assert_close(q.mean[0], torch.zeros(DIM, dtype=torch.float64))
    torch.testing.assert_close(q.log_std[0], torch.zeros(DIM, dtype=torch.float64))
    spread = q.log_std.sum(-1)
    assert (spread[1:] < -0.1).all()


def test_users_do_not_touch_each_other():
    (rows, loading), noise = _problem("mixture"), standard_draws(16, DIM)
    together = fit_users(rows, loading, "mixture", noise, steps=40, tolerance=0.0).q
    mine = rows.user == 2
    alone = MembershipRows(
        rows.gate_log_weights[mine],
        rows.score[mine],
        torch.zeros(int(mine.sum()), dtype=torch.long),
        rows.weight[mine],
        1,
    )
    q = fit_users(alone, loading, "mixture", noise, steps=40, tolerance=0.0).q
    torch.testing.assert_close(q.mean[0], together.mean[2])
    torch.testing.assert_close(q.log_std[0], together.log_std[2])


def test_a_warm_start_goes_on_from_there():
    (rows, loading), noise = _problem("mixture"), standard_draws(16, DIM)
    first = fit_users(rows, loading, "mixture", noise, steps=200, tolerance=1e-13)
    again = fit_users(rows, loading, "mixture", noise, start=first.q, steps=1)
    torch.testing.assert_close(again.elbo, first.elbo, atol=1e-9, rtol=0)


def test_its_mean_is_the_posteriors_where_that_is_nearly_gaussian():
    rows, loading = _problem("log_linear", counts=(30,), seed=2)
    loading = loading[:, :1]
    q = fit_users(rows, loading, "log_linear", standard_draws(64, 1)).q
    nodes, masses = np.polynomial.hermite_e.hermegauss(80)
    z = torch.from_numpy(nodes).view(-1, 1, 1)
    log_lik = (rows_log_lik(rows, loading, z, "log_linear") * rows.weight).sum(1) + torch.from_numpy(masses).log()
    mass = log_lik.softmax(0)
    mean = (mass * z.flatten()).sum()
    std = ((mass * z.flatten().square()).sum() - mean.square()).sqrt()
    assert q.mean.item() == pytest.approx(mean.item(), abs=0.1)
    assert q.log_std.exp().item() == pytest.approx(std.item(), rel=0.3)  # KL(q || p) prefers narrow
