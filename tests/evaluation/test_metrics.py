"""Metrics against independent implementations (scikit-learn) and against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix.evaluation import metrics

labelings = st.integers(2, 30).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n) for _ in range(2)])
)


def test_accuracy_counts_ties_as_half() -> None:
    assert metrics.accuracy([2.0, -1.0, 0.0, 1e-9]) == pytest.approx(2.5 / 4)
    assert metrics.accuracy([1.0, -1.0], weight=[3.0, 1.0]) == pytest.approx(0.75)


def test_accuracy_of_nothing_is_nan() -> None:
    assert math.isnan(metrics.accuracy([]))


def test_log_loss_of_a_coin_is_log_two() -> None:
    assert metrics.log_loss(np.log([0.5, 0.5])) == pytest.approx(math.log(2))


@settings(max_examples=100, deadline=None)
@given(labelings)
def test_agreement_equals_scikit_learn(pair: tuple[list[int], list[int]]) -> None:
    reference = pytest.importorskip("sklearn.metrics")
    labels, clusters = pair
    assert metrics.adjusted_rand_index(labels, clusters) == pytest.approx(
        reference.adjusted_rand_score(labels, clusters), abs=1e-12
    )
    assert metrics.normalized_mutual_information(labels, clusters) == pytest.approx(
        reference.normalized_mutual_info_score(labels, clusters), abs=1e-9
    )


@settings(max_examples=50, deadline=None)
@given(labelings, st.permutations(range(5)))
def test_agreement_ignores_names(pair: tuple[list[int], list[int]], names: list[int]) -> None:
    labels, clusters = pair
    renamed = [names[c] for c in clusters]
    for figure in (metrics.adjusted_rand_index, metrics.normalized_mutual_information, metrics.matched_accuracy):
        assert figure(labels, clusters) == pytest.approx(figure(labels, renamed), abs=1e-12)


def test_matched_accuracy_is_the_best_of_all_matchings() -> None:
    from itertools import permutations

    rng = np.random.default_rng(0)
    for _ in range(20):
        labels, clusters = rng.integers(0, 4, 25), rng.integers(0, 4, 25)
        best = max(np.mean(np.array(order)[clusters] == labels) for order in permutations(range(4)))
        assert metrics.matched_accuracy(labels, clusters) == pytest.approx(best)


def test_agreement_leaves_out_items_without_a_group() -> None:
    log_resp = np.log([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.9, 0.1]])
    result = metrics.agreement([0, 0, 1, -1], log_resp)
    assert result is not None and result.ari == 1.0 and result.num_items == 3
    assert metrics.agreement([-1, -1, -1, 0], log_resp) is None


def test_calibration_error_by_hand() -> None:
    # Four comparisons at p = 0.82 of which three are right: |0.75 - 0.82|; one at p = 0.56, wrong: |0 - 0.56|.
    right, slight = np.log(0.82 / 0.18), np.log(0.44 / 0.56)
    table = metrics.reliability([right, right, right, -right, slight])
    assert table.ece == pytest.approx(0.8 * 0.07 + 0.2 * 0.56)
    np.testing.assert_array_equal(table.num_rows, [0, 1, 0, 0, 0, 0, 4, 0, 0, 0])


def test_calibrated_probabilities_have_small_error_and_overconfident_ones_do_not() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.5, 1.0, 40_000)
    sign = np.where(rng.uniform(size=confidence.size) < confidence, 1.0, -1.0)
    logit = np.log(confidence / (1 - confidence))
    assert metrics.expected_calibration_error(sign * logit) < 0.01
    assert metrics.expected_calibration_error(3 * sign * logit) > 0.05


def test_share_of_gap_is_undefined_within_two_standard_errors() -> None:
    assert metrics.share_of_gap_closed(0.7, 0.5, 0.75, 0.02).share == pytest.approx(0.8)
    assert metrics.share_of_gap_closed(0.55, 0.5, 0.53, 0.02).share is None
    assert metrics.share_of_gap_closed(0.55, 0.5, 0.4, 0.001).share is None
    assert metrics.share_of_gap_closed(0.55, 0.5, 0.9, float("nan")).share is None
    assert "undefined" in str(metrics.share_of_gap_closed(0.55, 0.5, 0.53, 0.02))


def test_usage_is_mean_responsibility() -> None:
    np.testing.assert_allclose(metrics.usage([[1.0, 0.0], [0.5, 0.5]]), [0.75, 0.25])
