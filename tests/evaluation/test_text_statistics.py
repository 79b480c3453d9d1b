"""Diversity and repetition on texts small enough to count by hand."""

from __future__ import annotations

import math

import pytest

from prefmix.evaluation.text_statistics import distinct_share, overlap_within_prompts, repetition


def test_distinct_share_counts_n_grams_over_all_texts() -> None:
    assert distinct_share(["a b c", "a b d"], 2) == pytest.approx(3 / 4)  # ab twice, bc, bd
    assert distinct_share(["a a a a"], 1) == pytest.approx(1 / 4)
    assert math.isnan(distinct_share(["a"], 2))


def test_repetition_is_the_share_of_n_grams_that_stood_before() -> None:
    assert repetition("a b c a b c a b c", 3) == pytest.approx(1 - 3 / 7)
    assert repetition("a b c d e", 3) == 0
    assert repetition("a", 3) == 0


def test_overlap_is_one_for_equal_responses_and_zero_for_disjoint_ones() -> None:
    assert overlap_within_prompts(["a b c", "A b, c!"], [0, 0]) == 1
    assert overlap_within_prompts(["a b c", "d e f"], [0, 0]) == 0
    assert overlap_within_prompts(["a b c", "a b d", "x y", "x y"], [0, 0, 1, 1]) == pytest.approx((0.5 + 1) / 2)
    assert math.isnan(overlap_within_prompts(["a b", "a b"], [0, 1]))
