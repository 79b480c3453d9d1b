"""Weights for somebody unknown: games over the policy's own users, comparisons by group, and what generation does."""

from __future__ import annotations

import pytest
import torch

from prefmix.mixture.group_objectives import average_weights, max_min_weights, worst_group_weights
from prefmix.policy.unknown_users import user_utility

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
