"""Weights for somebody unknown: games over the policy's own users, comparisons by group, and what generation does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prefmix.mixture.gates import Gate
from prefmix.mixture.group_objectives import average_weights, max_min_weights, worst_group_weights
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.modular import remove_expert
from prefmix.policy.unknown_users import user_utility
from prefmix.policy.user_weights import UserWeights

ROWS = [
    {"prompt": "What is it?", "chosen": " blue", "rejected": " green", "user": "anna", "group": "b"},
    {"prompt": "What is it?", "chosen": " green", "rejected": " blue", "user": "bob", "group": "a"},
    {"prompt": "Where is the sun?", "chosen": " In the sky.", "rejected": " In the sea.", "user": "carl", "group": "a"},
    {"prompt": "Where is the sun?", "chosen": " In the sea.", "rejected": " In the sky."},
]


def opposed(make_policy):
    """Anna is of expert 0, bob of expert 1; carl never said anything."""
    policy = make_policy(num_experts=2, users=("anna", "bob", "carl"))
    policy.users.log_lik = torch.tensor([[-2.0, -40.0], [-60.0, -4.0], [0.0, 0.0]], dtype=torch.float64)
    policy.users.count = torch.tensor([4.0, 8.0, 0.0], dtype=torch.float64)
    return policy


def test_the_game_is_over_the_types_of_the_policys_users(make_policy):
    """U = [[-0.5, -10], [-7.5, -0.5]]; max-min weights make both rows equal: w = 7 / 16.5 on the first."""
    policy = opposed(make_policy)
    expected = torch.tensor([[-0.5, -10.0], [-7.5, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(user_utility(policy), expected, atol=1e-6, rtol=0)
    found = policy.unknown_user_weights("max_min")
    first = 9.5 / 16.5
    torch.testing.assert_close(found.weights, torch.tensor([first, 1 - first]).double(), atol=1e-6, rtol=0)
    regret = policy.unknown_user_weights("min_max_regret")
    assert regret.value == pytest.approx(-float(9.5 * 7.0 / 16.5), abs=1e-5)
    assert not torch.allclose(found.weights, policy.gate_weights(), atol=0.02)


def test_rows_decide_by_group_or_by_user(make_policy):
    policy = opposed(make_policy)
    log_lik = torch.tensor([entry["probabilities"] for entry in policy.score(ROWS)], dtype=torch.float64).log()
    by_group, by_user = torch.tensor([1, 0, 0]), torch.tensor([0, 1, 2])
    pairs = {
        ("average", "group"): average_weights(log_lik[:3], by_group, 2),
        ("worst_group", "user"): worst_group_weights(log_lik[:3], by_user, 3),
        ("max_min", "group"): max_min_weights(torch.stack([log_lik[1:3].mean(0), log_lik[0]])),
    }
    for (objective, by), expected in pairs.items():
        found = policy.unknown_user_weights(objective, ROWS, by)
        torch.testing.assert_close(found.weights, expected.weights)
        assert found.value == pytest.approx(expected.value)


def test_generation_takes_the_weights(make_policy):
    policy = opposed(make_policy)
    weights = policy.unknown_user_weights("max_min").weights
    assert isinstance(policy.generate("What is it?", weights=weights, max_new_tokens=2, seed=0), str)


def test_what_cannot_be_decided_is_said(make_policy):
    policy = opposed(make_policy)
    with pytest.raises(ValueError, match="objective='best'"):
        policy.unknown_user_weights("best")
    with pytest.raises(ValueError, match="without rows"):
        policy.unknown_user_weights("average")
    with pytest.raises(ValueError, match="no row has a group"):
        policy.unknown_user_weights("average", [{k: v for k, v in ROWS[0].items() if k != "group"}], "group")
    policy.users.count.zero_()
    with pytest.raises(ValueError, match="no user's comparisons"):
        policy.unknown_user_weights("max_min")


def test_a_default_serves_whoever_is_unknown_and_nobody_else(make_policy, tmp_path):
    policy = opposed(make_policy)
    before = {name: policy.weights(user=name) for name in ("anna", "bob")}
    gate, expected = policy.weights(), policy.unknown_user_weights("min_max_regret").weights
    assert not torch.allclose(expected, gate, atol=0.02)
    policy.set_unknown_users("max_min")
    policy.set_unknown_users("min_max_regret")
    policy.save_pretrained(tmp_path / "policy")
    again = MixturePolicy.from_pretrained(tmp_path / "policy", base=policy.model.experts.base_model)
    assert again.config.unknown_users["objective"] == "min_max_regret"
    assert "(`min_max_regret`)" in (tmp_path / "policy" / "README.md").read_text()
    for kept in (policy, again):
        torch.testing.assert_close(kept.weights(), expected)
        torch.testing.assert_close(kept.weights(user="carl"), expected)  # known by name alone
        with pytest.warns(UserWarning, match="nobody"):
            torch.testing.assert_close(kept.weights(user="nobody"), expected)
        for name, weights in before.items():
            torch.testing.assert_close(kept.weights(user=name), weights)
        torch.testing.assert_close(kept.gate_weights(), gate)  # the prior, with which `adapt` begins, stays
    scored = again.score(ROWS)
    assert scored[3]["weights"] == pytest.approx(expected.tolist()) and scored[0]["weights"] != scored[3]["weights"]
    given, default = (again.generate("x", seed=3, max_new_tokens=4, weights=w) for w in (expected, None))
    assert given == default
    again.forget("anna")
    with pytest.warns(UserWarning, match="anna"):
        torch.testing.assert_close(again.weights(user="anna"), expected)
    again.set_unknown_users(None)
    torch.testing.assert_close(again.weights(), gate)


def test_a_default_must_fit_the_experts_and_goes_when_they_change(make_policy):
    policy = opposed(make_policy)
    policy.set_unknown_users("worst_group", ROWS, by="group")
    assert len(policy.config.default_weights) == 2
    assert remove_expert(policy, 1).config.default_weights is None
    with pytest.raises(ValueError, match="unknown_users.weights"):
        replace(policy.config, unknown_users={"objective": "mine", "weights": [1.0]})


@pytest.mark.parametrize("told", [None, {"user_age": 30}])
def test_metadata_that_the_gate_reads_says_something(make_policy, monkeypatch, told):
    policy = opposed(make_policy)
    gate, mean = policy.weights(), torch.tensor([0.25, 0.75])
    policy.config = replace(policy.config, unknown_users={"objective": "average", "weights": mean.tolist()})
    monkeypatch.setattr(UserWeights, "_gate", lambda self, prompts, index, metadata: gate.log().expand(len(index), -1))
    monkeypatch.setattr(Gate, "reads", {"metadata"})
    torch.testing.assert_close(policy.weights(metadata=told), mean.double() if told is None else gate)
