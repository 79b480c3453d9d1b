"""Kinds of feedback in one batch equal each kind alone, and marginals of the mixture equal their definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from prefmix.mixture.bradley_terry import implicit_rewards, preference_log_lik
from prefmix.mixture.likelihoods.feedback import (
    FeedbackRows,
    feedback_log_lik,
    marginal_log_lik,
    normalised,
    pair_outcomes,
    sides_of,
)
from prefmix.mixture.likelihoods.mixture_reward import bt_lse_logit
from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.mixture.likelihoods.plackett_luce import Rankings, plackett_luce
from prefmix.mixture.likelihoods.ties import davidson

F64 = torch.float64
BETA = torch.tensor([0.5, 0.8], dtype=F64)
CHOSEN, REJECTED = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 4, 0, 1])
LENGTH = torch.tensor([3, 1, 4, 2, 6])


def _texts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(-5 + 2 * torch.randn(5, 2, dtype=F64, generator=generator) for _ in range(2))


def test_pairs_alone_are_dpo_bit_for_bit():
    texts = _texts()
    for noise in (0.0, 0.1):
        lik = feedback_log_lik(*texts, FeedbackRows(CHOSEN, REJECTED), BETA, FeedbackModel(label_noise=noise))
        rewards = implicit_rewards(*texts, BETA)
        assert torch.equal(lik.log_lik, preference_log_lik(rewards[CHOSEN] - rewards[REJECTED], noise))


def test_a_batch_of_all_kinds_equals_each_kind_alone():
    texts, model = _texts(1), FeedbackModel(ties="davidson", tie_strength=0.6)
    ranking = Rankings(
        torch.tensor([0, 4, 1, 2, 3, 4, 2, 0, 3, 1]), torch.tensor([2, 4, 2, 2]), torch.tensor([1, 3, 1, 1])
    )
    tie, label = torch.tensor([False, False, True, False]), torch.tensor([1.0, 1.0, 1.0, 0.7])
    mixed = feedback_log_lik(*texts, FeedbackRows(CHOSEN, REJECTED, LENGTH, tie, label, ranking), BETA, model)
    rewards = implicit_rewards(*texts, BETA)
    outcomes = davidson(rewards[CHOSEN] - rewards[REJECTED], 0.6)
    torch.testing.assert_close(mixed.log_lik[0], outcomes.win[0])
    torch.testing.assert_close(mixed.log_lik[1], plackett_luce(rewards, ranking)[1])
    torch.testing.assert_close(mixed.log_lik[2], outcomes.tie[2])
    torch.testing.assert_close(mixed.log_lik[3], 0.7 * outcomes.win[3] + 0.3 * outcomes.loss[3])


def test_label_smoothing_is_a_soft_label_but_for_robust():
    texts, rows = _texts(2), FeedbackRows(CHOSEN, REJECTED)
    smoothed = feedback_log_lik(*texts, rows, BETA, FeedbackModel(label_smoothing=0.2)).log_lik
    label = torch.full((4,), 0.8, dtype=F64)
    soft = feedback_log_lik(*texts, rows._replace(label=label), BETA, FeedbackModel()).log_lik
    torch.testing.assert_close(smoothed, soft)
    robust = feedback_log_lik(*texts, rows, BETA, FeedbackModel("robust", label_smoothing=0.2))
    expected = (0.8 * logsigmoid(robust.margins) - 0.2 * logsigmoid(-robust.margins)) / 0.6
    torch.testing.assert_close(robust.log_lik, expected)


def test_simpo_reads_no_reference_and_asks_for_a_margin():
    policy, reference = _texts(3)
    model = FeedbackModel("simpo", simpo_gamma=0.4)
    rows = FeedbackRows(CHOSEN, REJECTED, LENGTH)
    lik = feedback_log_lik(policy, reference, rows, BETA, model)
    assert torch.equal(lik.log_lik, feedback_log_lik(policy, 0 * reference, rows, BETA, model).log_lik)
    mean = policy / LENGTH.unsqueeze(1)
    torch.testing.assert_close(lik.log_lik, logsigmoid(BETA * (mean[CHOSEN] - mean[REJECTED]) - 0.4))


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "robust", "simpo"])
def test_normalised_outcomes_sum_to_one_and_keep_who_is_ahead(loss):
    margins = torch.randn(6, 2, dtype=F64)
    model = FeedbackModel(loss, label_smoothing=0.1 if loss == "robust" else 0.0)
    win, tie, ahead = normalised(pair_outcomes(margins, BETA, model))
    torch.testing.assert_close(win.exp() + ahead.exp(), torch.ones_like(win))
    assert (tie == -torch.inf).all()
    assert ((win > ahead) == (margins > 0)).all()


def test_marginals_of_the_mixture_are_their_definitions_and_gradients_are_right():
    texts, rows = _texts(4), FeedbackRows(CHOSEN, REJECTED)
    log_weights = torch.log_softmax(torch.randn(4, 2, dtype=F64), -1)
    sides, rewards = sides_of(*texts, rows), implicit_rewards(*texts, BETA)
    bt_lse = marginal_log_lik(log_weights, sides, BETA, FeedbackModel(likelihood="bt_lse"))
    torch.testing.assert_close(bt_lse, logsigmoid(bt_lse_logit(log_weights, rewards[CHOSEN], rewards[REJECTED])))
    policy, reference = (torch.logsumexp(log_weights.unsqueeze(1) + part, -1) for part in texts)
    at = torch.arange(4)
    ratio = policy - reference
    model = FeedbackModel(likelihood="policy")
    found = marginal_log_lik(log_weights, sides, BETA, model)
    torch.testing.assert_close(found, logsigmoid(0.5 * (ratio[at, CHOSEN] - ratio[at, REJECTED])))
    for name in ("bt_lse", "policy"):

        def marginal(log_probs: torch.Tensor, logits: torch.Tensor, name: str = name) -> torch.Tensor:
            weights = torch.log_softmax(logits, -1)
            return marginal_log_lik(weights, sides_of(log_probs, texts[1], rows), BETA, FeedbackModel(likelihood=name))

        inputs = texts[0].clone().requires_grad_(), torch.randn(4, 2, dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(marginal, inputs)


def test_model_survives_json_and_refuses_unknown_names():
    model = FeedbackModel("ipo", tie_strength=2.0)
    assert FeedbackModel.from_dict(model.to_dict(), 0.0) == model
    assert FeedbackModel(label_noise=0.1).to_dict() == {} and FeedbackModel(label_noise=0.1).is_plain
    with pytest.raises(ValueError, match="unknown fields"):
        FeedbackModel.from_dict({"loss": "ipo"}, 0.0)
