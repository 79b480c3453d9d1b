"""Fact 1 at the level of rows: the bound touches the evidence, has its gradient, and splits over minibatches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.elbo import elbo_rows
from prefmix.mixture.estep import ESTEPS
from prefmix.mixture.posterior import group_log_lik, posterior

ROWS, GROUPS, EXPERTS = 24, 7, 3


class Problem:
    """Random margins, gate logits, weights and groups in float64."""

    def __init__(self, seed: int, latent: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.latent = latent
        self.margins = 3 * torch.randn(ROWS, EXPERTS, generator=generator, dtype=torch.float64)
        self.weight = torch.rand(ROWS, generator=generator, dtype=torch.float64) + 0.1
        self.group = torch.randint(0, GROUPS, (ROWS,), generator=generator)
        if latent == "pair":
            self.group = torch.arange(ROWS)
        self.num_groups = ROWS if latent == "pair" else GROUPS
        self.logits = torch.randn(self.num_groups, EXPERTS, generator=generator, dtype=torch.float64)
        if latent == "pair":
            self.group_weight = torch.ones(ROWS, dtype=torch.float64)
        else:
            total = torch.zeros(GROUPS, dtype=torch.float64).index_add(0, self.group, self.weight)
            self.group_weight = total[self.group]

    def grouped(self, log_lik):
        return group_log_lik(log_lik, self.group, self.num_groups, None if self.latent == "pair" else self.weight)

    def evidence(self, margins, logits):
        """Log evidence of the whole data set, from the definition in method section 2."""
        by_group = posterior(logits.log_softmax(-1), self.grouped(preference_log_lik(margins))).log_evidence
        if self.latent == "pair":
            return (self.weight * by_group).sum()
        return by_group[self.group.unique()].sum()

    def elbo(self, margins, logits, log_q, rows=slice(None)):
        group = self.group[rows]
        return elbo_rows(
            preference_log_lik(margins[rows]),
            logits.log_softmax(-1)[group],
            log_q.exp()[group],
            log_q[group],
            self.weight[rows],
            self.group_weight[rows],
        ).elbo.sum()

    def exact_log_q(self):
        return ESTEPS["exact"](self.logits.log_softmax(-1), self.grouped(preference_log_lik(self.margins))).log_q


LATENTS = pytest.mark.parametrize("latent", ["pair", "user"])


@LATENTS
@pytest.mark.parametrize("seed", range(20))
def test_at_the_exact_posterior_the_bound_is_the_evidence(seed, latent):
    problem = Problem(seed, latent)
    bound = problem.elbo(problem.margins, problem.logits, problem.exact_log_q())
    assert bound.item() == pytest.approx(problem.evidence(problem.margins, problem.logits).item(), abs=1e-6)


@LATENTS
def test_with_q_held_fixed_its_gradient_is_the_evidences(latent):
    problem = Problem(0, latent)
    margins, logits = problem.margins.requires_grad_(), problem.logits.requires_grad_()
    log_q = problem.exact_log_q()
    of_bound = torch.autograd.grad(problem.elbo(margins, logits, log_q), (margins, logits))
    of_evidence = torch.autograd.grad(problem.evidence(margins, logits), (margins, logits))
    for bound, evidence in zip(of_bound, of_evidence, strict=True):
        torch.testing.assert_close(bound, evidence, atol=1e-12, rtol=1e-9)
    scale = problem.weight.unsqueeze(1)
    by_hand = scale * log_q.exp()[problem.group] * torch.sigmoid(-margins.detach())
    torch.testing.assert_close(of_bound[0], by_hand)


@LATENTS
def test_the_evidences_gradient_agrees_with_finite_differences(latent):
    problem = Problem(1, latent)
    margins, logits = problem.margins.requires_grad_(), problem.logits.requires_grad_()
    assert torch.autograd.gradcheck(problem.evidence, (margins, logits))


@LATENTS
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_any_other_q_gives_less(latent, seed):
    problem = Problem(seed, latent)
    noise = torch.randn(problem.num_groups, EXPERTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other = (problem.exact_log_q() + 0.1 * noise).log_softmax(-1)
    bound = problem.elbo(problem.margins, problem.logits, other)
    assert bound < problem.evidence(problem.margins, problem.logits)


@LATENTS
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), batch_size=st.sampled_from([1, 5, 8]))
def test_minibatches_sum_to_the_full_bound_at_any_q(latent, seed, batch_size):
    problem = Problem(seed, latent)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(problem.num_groups, EXPERTS, generator=generator, dtype=torch.float64)
    log_q = noise.log_softmax(-1)
    full = problem.elbo(problem.margins, problem.logits, log_q)
    batches = torch.randperm(ROWS, generator=generator).split(batch_size)
    total = sum(problem.elbo(problem.margins, problem.logits, log_q, rows) for rows in batches)
    torch.testing.assert_close(total, full)


@LATENTS
def test_the_mean_loss_over_an_epoch_is_the_full_bound_per_unit_of_weight(latent):
    problem = Problem(2, latent)
    problem.weight = torch.full_like(problem.weight, 2.0)
    if latent == "user":
        problem.group_weight = 2.0 * torch.bincount(problem.group, minlength=GROUPS)[problem.group].double()
    log_q = problem.exact_log_q()
    losses = [
        -problem.elbo(problem.margins, problem.logits, log_q, rows) / problem.weight[rows].sum()
        for rows in torch.randperm(ROWS).split(8)
    ]
    full = -problem.elbo(problem.margins, problem.logits, log_q) / problem.weight.sum()
    torch.testing.assert_close(torch.stack(losses).mean(), full)


def test_two_equal_anonymous_rows_are_two_draws():
    """Under `pair`, weight 2 means the same as the row twice; the posterior does not sharpen."""
    log_lik, log_weights = torch.tensor([[-0.1, -2.0]]), torch.tensor([[0.5, 0.5]]).log()
    q = ESTEPS["exact"](log_weights, log_lik)
    one = torch.ones(1)
    single = elbo_rows(log_lik, log_weights, q.resp, q.log_q, one, one).elbo
    double = elbo_rows(log_lik, log_weights, q.resp, q.log_q, 2 * one, one).elbo
    torch.testing.assert_close(double, 2 * single)


def test_identical_experts_get_identical_gradients():
    margins = torch.randn(6, 1, dtype=torch.float64).repeat(1, 3).requires_grad_()
    log_weights = torch.full((6, 3), -math.log(3.0), dtype=torch.float64)
    log_lik = preference_log_lik(margins)
    q = ESTEPS["exact"](log_weights, log_lik)
    ones = torch.ones(6, dtype=torch.float64)
    elbo_rows(log_lik, log_weights, q.resp, q.log_q, ones, ones).elbo.sum().backward()
    torch.testing.assert_close(q.log_q, log_weights)
    torch.testing.assert_close(margins.grad, margins.grad[:, :1].expand(6, 3))


def test_one_expert_is_dpo():
    margins = torch.randn(8, 1, dtype=torch.float64)
    zeros, ones = torch.zeros(8, 1, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    rows = elbo_rows(preference_log_lik(margins), zeros, zeros.exp(), zeros, ones, ones)
    torch.testing.assert_close(rows.elbo, torch.nn.functional.logsigmoid(margins[:, 0]))


def test_hard_responsibilities_and_weightless_groups_give_no_nan():
    log_lik = torch.tensor([[-1e4, -0.1], [-1.0, -2.0]], requires_grad=True)
    log_weights = torch.tensor([[-math.inf, 0.0], [-0.7, -0.7]], requires_grad=True)
    log_q = torch.tensor([[-math.inf, 0.0], [0.0, -math.inf]])
    rows = elbo_rows(log_lik, log_weights, log_q.exp(), log_q, torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
    rows.elbo.sum().backward()
    torch.testing.assert_close(rows.elbo, torch.tensor([-0.1, 0.0]))
    assert torch.isfinite(log_lik.grad).all() and torch.isfinite(log_weights.grad).all()
