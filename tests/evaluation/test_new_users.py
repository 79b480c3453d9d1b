"""Context and scored rows of new users never overlap."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix.evaluation.new_users import split_context


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-1, 5), max_size=60), st.integers(0, 3))
def test_context_and_scored_rows_are_disjoint_and_of_full_size(users: list[int], seed: int) -> None:
    user = np.array(users, dtype=np.int64)
    split = split_context(user, (0, 1, 2, 4, 8), seed)
    for n in split.sizes:
        context = (split.rank >= 0) & (split.rank < n)
        assert not (context & split.scored).any()
        assert set(user[context]) <= set(user[split.scored])
        for person in set(user[split.scored].tolist()):
            assert (context & (user == person)).sum() == n
    assert not split.scored[user < 0].any()


def test_half_of_the_people_must_afford_a_size() -> None:
    user = np.repeat([0, 1, 2, 3], [9, 9, 3, 2])
    split = split_context(user, (0, 1, 2, 4, 8, 16))
    assert split.sizes == (0, 1, 2, 4, 8)
    assert set(user[split.scored].tolist()) == {0, 1}


def test_order_depends_on_the_seed_only() -> None:
    user = np.repeat(np.arange(5), 10)
    assert (split_context(user, (4,), 0).rank == split_context(user, (4,), 0).rank).all()
    assert (split_context(user, (4,), 0).rank != split_context(user, (4,), 1).rank).any()
