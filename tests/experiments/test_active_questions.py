"""Five well chosen questions serve new users as well as ten random ones or more (500 users, 200 candidates, paired)."""

from __future__ import annotations

import pytest

from prefmix.data.simulation_options import Layout
from prefmix.experiments.active_questions import active_against_random


@pytest.mark.parametrize(("num_experts", "layout"), [(2, "opposed"), (4, "orthogonal")])
def test_five_active_questions_are_worth_ten_random_ones(num_experts: int, layout: Layout) -> None:
    curves = active_against_random(num_experts, layout, num_questions=10)
    assert curves.active.shape == curves.random.shape == (500, 11)
    assert (curves.active[:, 0] == curves.random[:, 0]).all()
    found = curves.to_dict()
    assert curves.as_good_as(5) >= 10
    # Paired over users, and by more than two standard errors unless both are at the floor.
    assert found["active_5_minus_random_10"] < 2 * found["standard_error"]
    assert curves.active[:, 5].mean() < curves.random[:, 5].mean()
