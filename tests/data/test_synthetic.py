"""Planted truth: disjoint texts, groups that answer as planted, and draws that do not give a group away."""

from __future__ import annotations

from collections import Counter

import pytest

from prefmix.data.planted_tasks import REVIEW_TASKS, convarg_groups, review_groups
from prefmix.data.synthetic import PlantedSplits, planted_groups

TEXTS = {
    prompt: {side: [f"{prompt}-{side}-{i}" for i in range(20)] for side in ("a", "b", "c")} for prompt in ("p", "q")
}
CYCLE = {"x": (2, 1, 0), "y": (0, 2, 1), "z": (1, 0, 2)}


def plant(**changes: object) -> PlantedSplits:
    arguments = {"num_users": 30, "comparisons_per_user": 20, "preferences": CYCLE, "seed": 0, "num_new_users": 6}
    return planted_groups(TEXTS, **(arguments | changes))  # type: ignore[arg-type]


def texts_of(rows: list[dict]) -> set[str]:
    return {row[side] for row in rows for side in ("chosen", "rejected")}


def agreement(rows: list[dict]) -> float:
    def value(row: dict, name: str) -> float:
        return CYCLE[row["group"]]["abc".index(row[name].split("-")[1])]

    return sum(value(row, "chosen") > value(row, "rejected") for row in rows) / len(rows)


def test_no_text_stands_in_two_splits():
    train, validation, test, new_users = plant()
    assert not texts_of(train) & texts_of(validation)
    assert not texts_of(train) & texts_of(test)
    assert not texts_of(validation) & texts_of(test)
    assert not texts_of(new_users) & (texts_of(train) | texts_of(validation))


def test_sizes_users_and_prompts():
    train, validation, test, new_users = plant()
    assert [len(rows) for rows in (train, validation, test, new_users)] == [600, 150, 600, 120]
    users = {row["user"]: row["group"] for row in train}
    assert Counter(users.values()) == {"x": 10, "y": 10, "z": 10}
    assert {row["user"]: row["group"] for row in test} == users
    assert not users.keys() & {row["user"] for row in new_users}
    assert all(
        row["chosen"].startswith(row["prompt"] + "-") and row["rejected"].startswith(row["prompt"]) for row in train
    )


def test_users_answer_as_their_group_would_but_for_noise():
    assert agreement(plant().train) == 1.0
    assert 0.72 < agreement(plant(noise=0.2).train) < 0.88


def test_what_was_asked_does_not_give_the_group_away():
    asked: dict[str, Counter] = {group: Counter() for group in CYCLE}
    for row in plant(num_users=300).train:
        asked[row["group"]][frozenset(row[name].split("-")[1] for name in ("chosen", "rejected"))] += 1
    for counts in asked.values():
        assert all(abs(count / counts.total() - 1 / 3) < 0.05 for count in counts.values())


def test_pairs_of_sides_that_leave_a_group_undecided_are_not_drawn():
    rows = plant(preferences={"x": (1, 1, 0), "y": (0, 1, 1)}).train
    assert {frozenset(row[name].split("-")[1] for name in ("chosen", "rejected")) for row in rows} == {frozenset("ac")}


def test_the_seed_decides_everything():
    assert plant() == plant()
    assert plant(seed=1) != plant()


def test_a_text_on_two_sides_is_left_out():
    sides = {"a": ["both", *(f"a{i}" for i in range(9))], "b": ["both", *(f"b{i}" for i in range(9))]}
    splits = planted_groups(
        {"p": sides}, num_users=20, comparisons_per_user=9, preferences={"x": (1, 0), "y": (0, 1)}, seed=0
    )
    assert "both" not in set().union(*map(texts_of, splits))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": 0.5}, "noise=0.5 must be at least 0 and below 0.5"),
        ({"preferences": {"x": (1, 0)}}, "must agree in the number of sides"),
        ({"preferences": {}}, "at least one group"),
        ({"preferences": {"x": (1, 1, 0), "y": (0, 1, 1), "z": (1, 0, 1)}}, "no two sides on which every group"),
    ],
)
def test_arguments_that_cannot_be_met_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        plant(**changes)


def test_too_few_texts_are_named():
    with pytest.raises(ValueError, match="side 'a' has 2 distinct texts"):
        planted_groups(
            {"p": {"a": ["1", "2"], "b": ["3", "4"]}},
            num_users=2,
            comparisons_per_user=1,
            preferences={"x": (1, 0)},
            seed=0,
        )


def test_convarg_groups_take_opposite_sides_of_one_debate_without_any_file_of_ours_missing():
    splits = convarg_groups(debates=["Is the school uniform"], num_users=8, comparisons_per_user=6, max_words=40)
    assert len({row["prompt"] for row in splits.train}) == 1
    assert all(len(text.split()) <= 40 for text in texts_of(splits.train))
    liked = {g: {r["chosen"] for r in splits.train if r["group"] == g} for g in ("first side", "second side")}
    assert not liked["first side"] & liked["second side"]
    with pytest.raises(ValueError, match=r"name no debate. Use beginnings of: Ban Plastic"):
        convarg_groups(debates=["Cats"])


@pytest.mark.parametrize("task", REVIEW_TASKS)
def test_review_groups_are_planted_over_real_reviews(task: str, prefmix_data):
    splits = review_groups(task, num_users=12, comparisons_per_user=4, num_new_users=3)  # type: ignore[arg-type]
    assert {row["group"] for row in splits.train} == set(REVIEW_TASKS[task].preferences)
    assert not texts_of(splits.train) & texts_of(splits.test)
    assert {len(text.split()) for text in texts_of(splits.train)} <= {12, 30}


def test_an_unknown_review_task_is_named():
    with pytest.raises(ValueError, match="task='mood' is not known. Use one of sentiment"):
        review_groups("mood")  # type: ignore[arg-type]
