"""The next question of a policy: the pair whose two answers move its own posterior most."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from prefmix.policy.questions import rank_questions

PROMPT = "What color is the sky?"
TEXTS = [" The sky is blue.", " The sky is green.", " No, it is not.", " In the sea."]
CANDIDATES = [
    {"prompt": PROMPT, "chosen": first, "rejected": second} for i, first in enumerate(TEXTS) for second in TEXTS[:i]
]


def _expected_fall(policy: Any, user: str | None, candidate: dict[str, str]) -> float:
    """Entropy of the weights less its mean after either answer, by `score` and Bayes' rule."""
    entry = policy.score([candidate | ({"user": user} if user else {})])[0]
    weights, first = np.array(entry["weights"]), np.array(entry["probabilities"])

    def entropy(p: np.ndarray) -> float:
        return float(-(p * np.log(p)).sum())

    after = sum((weights @ a) * entropy(weights * a / (weights @ a)) for a in (first, 1 - first))
    return entropy(weights) - after


@pytest.mark.parametrize("user", [None, "anna"])
def test_questions_are_ordered_by_what_an_answer_tells(make_policy: Any, user: str | None) -> None:
    policy = make_policy()
    ranked = rank_questions(policy, user, CANDIDATES)
    assert sorted(q.position for q in ranked) == list(range(len(CANDIDATES)))
    assert all(a.information >= b.information for a, b in zip(ranked, ranked[1:]))
    for question in ranked:
        assert question.candidate is CANDIDATES[question.position]
        assert question.information == pytest.approx(_expected_fall(policy, user, question.candidate), abs=1e-6)
    assert policy.next_question(user, CANDIDATES) == ranked[0]


def test_a_new_user_is_asked_without_a_warning_and_learns_from_the_answer(make_policy: Any) -> None:
    policy = make_policy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        question = policy.next_question("carol", CANDIDATES)
    before = policy.gate_weights()
    after = policy.adapt("carol", [question.candidate])
    assert not torch.allclose(before, after, atol=1e-4)


def test_what_cannot_be_asked_is_said(make_policy: Any) -> None:
    with pytest.raises(ValueError, match="latent='user'"):
        make_policy("pair").next_question("anna", CANDIDATES)
    with pytest.raises(ValueError, match="at least one pair"):
        make_policy().next_question("anna", [])
