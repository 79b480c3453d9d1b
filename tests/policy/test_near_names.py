"""Slips of the pen are found, other people are not, and a hundred thousand names are no obstacle."""

from __future__ import annotations

import time

import pytest

from prefmix.policy.near_names import near_name

KNOWN = ["anna", "bob", "Carol Smith", "user8", "user18"]


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("annna", "anna"),
        ("Anna", "anna"),
        ("nana", "anna"),
        ("carol smith ", "Carol Smith"),
        ("Carol Smit", "Carol Smith"),
        ("usr8", "user8"),
        ("user81", None),
        ("user9", None),
        ("zoe", None),
        ("", None),
    ],
)
def test_the_nearest_name_is_one_that_may_have_been_meant(typed: str, meant: str | None) -> None:
    assert near_name(typed, KNOWN) == meant
    assert near_name(typed, []) is None


def test_many_names_are_searched_at_once() -> None:
    codes = [f"user{number}" for number in range(100_000)]
    names = [f"{a}{b}{c}" for a in "abcdefghij" for b in "klmnopqrst" for c in ("ine", "on", "o", "a", "us")]
    start = time.perf_counter()
    assert near_name("usr4711", codes) == "user4711"
    assert near_name("USER4711", codes) == "user4711"
    assert near_name("user100001", codes) is None
    assert near_name("xkine", names) in names
    assert time.perf_counter() - start < 5
