"""Likelihoods of feedback against enumeration, TRL's formulas, finite differences and `choix`."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from prefmix.mixture.bradley_terry import mixture_log_lik, preference_log_lik
from prefmix.mixture.likelihoods.beta_dpo import adapt_beta
from prefmix.mixture.likelihoods.dr_dpo import distributionally_robust_sum
from prefmix.mixture.likelihoods.hinge import hinge_log_lik
from prefmix.mixture.likelihoods.ipo import ipo_log_lik
from prefmix.mixture.likelihoods.mixture_reward import bt_lse_logit, log_linear_logit, policy_logit
from prefmix.mixture.likelihoods.plackett_luce import Rankings, plackett_luce
from prefmix.mixture.likelihoods.rewards import mean_token_rewards, reference_free_rewards
from prefmix.mixture.likelihoods.robust import robust_log_lik
from prefmix.mixture.likelihoods.soft_labels import soft_label_log_lik
from prefmix.mixture.likelihoods.ties import TIES, davidson, rao_kupper

F64 = torch.float64


def _margins(seed: int = 0, rows: int = 6, experts: int = 3) -> torch.Tensor:
    return 2 * torch.randn(rows, experts, dtype=F64, generator=torch.Generator().manual_seed(seed))


def _rankings(rows: list[list[int]], stages: list[int] | None = None) -> Rankings:
    size = torch.tensor([len(row) for row in rows])
    judged = size - 1 if stages is None else torch.tensor(stages)
    return Rankings(torch.tensor([text for row in rows for text in row]), size, judged)


@pytest.mark.parametrize("model", TIES)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 4.0])
def test_win_tie_and_loss_sum_to_one_and_swap_with_the_sides(model, strength):
    margins = _margins()
    outcomes = TIES[model](margins, strength)
    torch.testing.assert_close(torch.stack(outcomes).exp().sum(0), torch.ones_like(margins))
    swapped = TIES[model](-margins, strength)
    torch.testing.assert_close(outcomes.win, swapped.loss)
    torch.testing.assert_close(outcomes.tie, swapped.tie)


@pytest.mark.parametrize("model", TIES)
def test_without_ties_both_are_bradley_terry(model):
    margins = _margins().requires_grad_()
    win, tie, loss = TIES[model](margins, 0.0)
    torch.testing.assert_close(win, logsigmoid(margins))
    torch.testing.assert_close(loss, logsigmoid(-margins))
    assert (tie == -torch.inf).all()
    (gradient,) = torch.autograd.grad(win.sum(), margins)
    torch.testing.assert_close(gradient, torch.sigmoid(-margins))


def test_share_of_ties_between_equals_is_as_documented():
    equal = torch.zeros(1, 1, dtype=F64)
    assert davidson(equal, 1.0).tie.exp().item() == pytest.approx(1 / 3)
    assert rao_kupper(equal, 0.8).tie.exp().item() == pytest.approx(math.tanh(0.4))


@pytest.mark.parametrize("model", TIES)
def test_negative_tie_strength_is_refused(model):
    with pytest.raises(ValueError, match="tie_strength is -1"):
        TIES[model](_margins(), -1.0)


def test_probabilities_of_all_orders_sum_to_one():
    rewards = _margins(1, rows=4)
    orders = [list(order) for order in itertools.permutations(range(4))]
    torch.testing.assert_close(plackett_luce(rewards, _rankings(orders)).exp().sum(0), torch.ones(3, dtype=F64))
    best = plackett_luce(rewards, _rankings([[i] + [j for j in range(4) if j != i] for i in range(4)], [1] * 4))
    torch.testing.assert_close(best, torch.log_softmax(rewards, dim=0))


def test_the_first_places_are_the_sum_over_all_orders_of_the_rest():
    rewards = _margins(2, rows=5)
    judged = plackett_luce(rewards, _rankings([[3, 1, 0, 2, 4]], [2]))
    orders = [[3, 1, *rest] for rest in itertools.permutations([0, 2, 4])]
    torch.testing.assert_close(judged[0], torch.logsumexp(plackett_luce(rewards, _rankings(orders)), dim=0))


def test_rankings_of_two_are_bradley_terry_and_ragged_batches_equal_single_rows():
    rewards = _margins(3, rows=7)
    rows = [[0, 1], [2, 3, 4], [5], [6, 0, 2, 4, 1]]
    together = plackett_luce(rewards, _rankings(rows))
    for row, log_lik in zip(rows, together, strict=True):
        torch.testing.assert_close(plackett_luce(rewards, _rankings([row]))[0], log_lik)
    torch.testing.assert_close(together[0], logsigmoid(rewards[0] - rewards[1]))
    assert (together[2] == 0).all()  # one text: nothing was judged


def test_plackett_luce_fit_equals_choix():
    choix = pytest.importorskip("choix")
    rng = np.random.default_rng(0)
    truth = rng.normal(size=6)
    rankings = [tuple(int(i) for i in choix.generate_rankings(truth, 4, 1)[0]) for _ in range(60)]
    theirs = choix.opt_rankings(6, rankings, alpha=1e-3, method="Newton-CG", tol=1e-12)
    rewards = torch.zeros(6, 1, dtype=F64, requires_grad=True)
    optimiser = torch.optim.LBFGS([rewards], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    batch = _rankings([list(row) for row in rankings])

    def loss():
        optimiser.zero_grad()
        value = -plackett_luce(rewards, batch).sum() + 1e-3 * rewards.square().sum()  # choix: alpha |r|^2, no half
        value.backward()
        return value

    optimiser.step(loss)
    ours = rewards.detach()[:, 0]
    np.testing.assert_allclose(ours - ours.mean(), theirs - theirs.mean(), atol=1e-5)


def test_soft_labels_are_weighted_repetition_and_their_optimum_is_the_log_odds():
    win, loss = logsigmoid(_margins()), logsigmoid(-_margins())
    label = torch.tensor([1.0, 0.0, 0.5, 0.2, 0.9, 0.7], dtype=F64)
    mixed = soft_label_log_lik(win, loss, label)
    torch.testing.assert_close(mixed[0], win[0])
    torch.testing.assert_close(mixed[1], loss[1])
    torch.testing.assert_close(10 * mixed[5], 7 * win[5] + 3 * loss[5])
    best = torch.full((1, 1), math.log(0.7 / 0.3), dtype=F64, requires_grad=True)
    soft_label_log_lik(logsigmoid(best), logsigmoid(-best), torch.tensor([0.7], dtype=F64)).sum().backward()
    assert abs(best.grad.item()) < 1e-12


def test_losses_are_those_of_trl():
    ratio, beta, epsilon = _margins(4, experts=1), 0.3, 0.2
    margins = beta * ratio
    torch.testing.assert_close(-hinge_log_lik(margins), torch.relu(1 - beta * ratio))
    torch.testing.assert_close(-ipo_log_lik(margins, torch.tensor([beta], dtype=F64)), (ratio - 1 / (2 * beta)) ** 2)
    clean, flipped = -(1 - epsilon) * logsigmoid(margins), -epsilon * logsigmoid(-margins)
    torch.testing.assert_close(-robust_log_lik(margins, epsilon), (clean - flipped) / (1 - 2 * epsilon))
    torch.testing.assert_close(robust_log_lik(margins, 0.0), logsigmoid(margins))


def test_robust_loss_is_unbiased_over_flipped_labels():
    margins, e = _margins(), 0.3
    mean = (1 - e) * robust_log_lik(margins, e) + e * robust_log_lik(-margins, e)
    torch.testing.assert_close(mean, logsigmoid(margins))


def test_rewards_per_token_are_those_of_trl():
    log_probs, reference, beta = -_margins(1).abs(), -_margins(2).abs(), torch.tensor([0.1, 0.2, 2.0], dtype=F64)
    length = torch.tensor([1, 2, 3, 4, 5, 9])
    torch.testing.assert_close(
        mean_token_rewards(log_probs, reference, length, beta)[3], beta * (log_probs - reference)[3] / 4
    )
    torch.testing.assert_close(reference_free_rewards(log_probs, length, beta)[5], beta * log_probs[5] / 9)


def test_the_robust_sum_lies_between_the_mean_and_the_best_row():
    log_lik, weight = -_margins(experts=1)[:, 0].abs(), torch.tensor([1, 2, 1, 0, 1, 1], dtype=F64)
    plain = (weight * log_lik).sum()
    torch.testing.assert_close(distributionally_robust_sum(log_lik, weight, 1e7).sum(), plain, atol=1e-5, rtol=0)
    robust = distributionally_robust_sum(log_lik, weight, 0.5).sum()
    assert plain < robust < weight.sum() * log_lik[weight > 0].max()
    # a row of weight 2 is two rows
    repeated = distributionally_robust_sum(log_lik[[0, 1, 1, 2, 4, 5]], torch.ones(6, dtype=F64), 0.5).sum()
    torch.testing.assert_close(robust, repeated)
    # Dr. DPO as printed: -b log E[exp(-loss / b)]
    ones = torch.ones(6, dtype=F64)
    printed = -0.5 * torch.log(torch.exp(log_lik / 0.5).mean())
    torch.testing.assert_close(-distributionally_robust_sum(log_lik, ones, 0.5).sum() / 6, printed)
    assert (distributionally_robust_sum(log_lik, 0 * ones, 0.5) == 0).all()


def test_beta_follows_the_gap_of_a_batch():
    margins, beta = _margins(rows=8, experts=2), torch.tensor([0.1, 0.2], dtype=F64)
    threshold = torch.tensor([0.3, -0.1], dtype=F64)
    equal = torch.ones(8, 2, dtype=F64)
    result = adapt_beta(margins, equal, beta, threshold, alpha=0.6, momentum=0.9)
    mean = margins.mean(0)
    torch.testing.assert_close(result.beta, beta * (1 + 0.6 * (mean - threshold)).clamp_min(0.1))
    torch.testing.assert_close(result.threshold, 0.9 * threshold + 0.1 * mean)
    alone = adapt_beta(margins, equal * torch.tensor([1.0, 0.0]), beta, threshold)
    assert alone.beta[1] == beta[1] and alone.threshold[1] == threshold[1]  # no rows: nothing to follow
    assert (adapt_beta(margins - 1e4, equal, beta, threshold).beta > 0).all()


def test_four_likelihoods_of_experts_together_differ_as_stated():
    log_weights = torch.tensor([[0.5, 0.5]], dtype=F64).log()
    chosen, rejected = torch.tensor([[3.0, 0.0]], dtype=F64), torch.tensor([[0.0, 1.0]], dtype=F64)
    mbt = mixture_log_lik(log_weights, logsigmoid(chosen - rejected)).exp().item()
    bt_lse = torch.sigmoid(bt_lse_logit(log_weights, chosen, rejected)).item()
    assert mbt == pytest.approx(0.611, abs=5e-4)
    assert bt_lse == pytest.approx(0.850, abs=5e-4)
    log_linear = torch.sigmoid(log_linear_logit(log_weights, chosen - rejected)).item()
    assert log_linear == pytest.approx(0.731, abs=5e-4)
    # bt_lse is a mixture of Bradley-Terry likelihoods whose weights follow the rewards
    v = torch.log_softmax(log_weights + torch.logaddexp(chosen, rejected), dim=-1)
    mixed = mixture_log_lik(v, logsigmoid(chosen - rejected))
    assert mixed.exp().item() == pytest.approx(bt_lse)


def test_the_summed_margin_is_dpos_margin_of_the_product_of_experts_over_whole_responses():
    generator, beta = torch.Generator().manual_seed(0), 0.3
    log_probs = torch.randn(3, 9, generator=generator, dtype=F64).log_softmax(-1)  # K experts, nine responses
    reference = torch.randn(9, generator=generator, dtype=F64).log_softmax(-1)
    log_weights = torch.randn(3, generator=generator, dtype=F64).log_softmax(-1)
    product = (reference + (log_weights.exp()[:, None] * (log_probs - reference)).sum(0)).log_softmax(-1)
    reward = beta * (product - reference)
    margins = beta * ((log_probs - reference)[:, 0] - (log_probs - reference)[:, 1])
    logit = log_linear_logit(log_weights[None], margins[None])
    torch.testing.assert_close(logit[0], reward[0] - reward[1])


def test_policy_likelihood_is_dpo_on_the_mixed_probabilities_and_all_three_agree_for_one_expert():
    weights = torch.tensor([[0.2, 0.8]], dtype=F64)
    policy_w, policy_l = torch.tensor([[0.3, 0.1]], dtype=F64), torch.tensor([[0.2, 0.4]], dtype=F64)
    ref_w, ref_l = torch.tensor([[0.1, 0.2]], dtype=F64), torch.tensor([[0.3, 0.2]], dtype=F64)
    logit = policy_logit(weights.log(), (policy_w.log(), ref_w.log()), (policy_l.log(), ref_l.log()), 0.5)
    by_hand = 0.5 * math.log((0.14 / 0.18) / (0.36 / 0.22))
    assert logit.item() == pytest.approx(by_hand)
    one = torch.zeros(1, 1, dtype=F64)
    first = (policy_w[:, :1].log(), ref_w[:, :1].log()), (policy_l[:, :1].log(), ref_l[:, :1].log())
    rewards = [0.5 * (a - b) for a, b in first]
    torch.testing.assert_close(policy_logit(one, *first, 0.5), (rewards[0] - rewards[1])[:, 0])
    torch.testing.assert_close(bt_lse_logit(one, *rewards), (rewards[0] - rewards[1])[:, 0])


FUNCTIONS = {
    "davidson win": lambda m: davidson(m, 0.7).win,
    "davidson tie": lambda m: davidson(m, 0.7).tie,
    "rao_kupper win": lambda m: rao_kupper(m, 0.7).win,
    "rao_kupper tie": lambda m: rao_kupper(m, 0.7).tie,
    "robust": lambda m: robust_log_lik(m, 0.2),
    "ipo": lambda m: ipo_log_lik(m, torch.ones(m.shape[1], dtype=m.dtype)),
    "hinge": hinge_log_lik,
    "soft": lambda m: soft_label_log_lik(logsigmoid(m), logsigmoid(-m), torch.full((len(m),), 0.3, dtype=m.dtype)),
    "noise": lambda m: preference_log_lik(m, 0.1),
    "ranking": lambda m: plackett_luce(m, _rankings([[0, 1, 2], [3, 4], [5, 0, 1, 2]], [1, 1, 3])),
    "robust sum": lambda m: distributionally_robust_sum(m[:, 0], torch.ones(len(m), dtype=m.dtype), 0.7),
    "bt_lse": lambda m: bt_lse_logit(torch.log_softmax(m[:1], -1), m[1:2], m[2:3]),
    "policy": lambda m: policy_logit(torch.log_softmax(m[:1], -1), (m[1:2], m[2:3]), (m[3:4], m[4:5]), 0.3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_equal_finite_differences(name):
    assert torch.autograd.gradcheck(FUNCTIONS[name], (_margins(5).requires_grad_(),))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_margins_are_finite_in_value_and_gradient(name, sign):
    margins = (sign * 1e4 * torch.tensor([[1.0, -1.0, 0.0]] * 6)).requires_grad_()
    value = FUNCTIONS[name](margins)
    value.sum().backward()
    assert value.isfinite().all() and margins.grad.isfinite().all()
