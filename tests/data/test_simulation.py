"""Planted people: tastes as laid out, answers as often as their probabilities say, and oracles against enumeration."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from prefmix.data.simulated_files import write_simulated
from prefmix.data.simulated_texts import argument_pools, feature_pools
from prefmix.data.simulation import outcome_log_probs, simulate, taste_directions
from prefmix.data.simulation_options import SimulationOptions
from prefmix.data.simulation_oracle import oracle, true_probability
from prefmix.data.validation import validate

SMALL = SimulationOptions(num_users=12, comparisons_per_user=4, test_per_user=4, num_new_users=5)
POOLS = feature_pools(4, num_prompts=5, texts_per_prompt=8)


@pytest.mark.parametrize(
    ("layout", "groups", "cosines"),
    [
        ("opposed", 2, [[1, -1], [-1, 1]]),
        ("opposed", 3, [[1, -1, 0], [-1, 1, 0], [0, 0, 1]]),
        ("orthogonal", 4, np.eye(4)),
        ("shared", 3, [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]]),
        ("shared", 1, [[1]]),
    ],
)
def test_tastes_stand_at_the_angles_of_their_layout(layout: str, groups: int, cosines: object) -> None:
    options = SimulationOptions(num_groups=groups, layout=layout)  # type: ignore[arg-type]
    directions = POOLS["train"].directions(np.random.default_rng(0))
    v = taste_directions(options, directions)
    np.testing.assert_allclose(v @ v.T, cosines, atol=1e-12)


def test_attributes_give_differences_of_unit_covariance_within_a_prompt() -> None:
    for pool in (feature_pools(3, num_prompts=4, texts_per_prompt=500)["train"], argument_pools()["train"]):
        first, second = pool.draw_pairs(20_000, np.random.default_rng(0))
        assert (pool.prompt_of[first] == pool.prompt_of[second]).all()
        assert (first != second).all()
        difference = pool.attributes[first] - pool.attributes[second]
        np.testing.assert_allclose(difference.T @ difference / len(first), np.eye(difference.shape[1]), atol=0.35)


def test_splits_share_no_text_and_new_users_stand_nowhere_else() -> None:
    for pools in (POOLS, argument_pools()):
        found = simulate(pools, SMALL)
        texts = {s: {(r["prompt"], r[c]) for r in found.rows(s) for c in ("chosen", "rejected")} for s in found.judged}
        assert not texts["train"] & (texts["test"] | texts["new_users"])
        users = {s: {row["user"] for row in found.rows(s)} for s in found.judged}
        assert users["train"] == users["test"]
        assert not users["new_users"] & users["train"]


@pytest.mark.parametrize(("noise", "ties"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.5), (0.1, 1.0)])
def test_outcomes_are_as_frequent_as_their_probabilities(noise: float, ties: float) -> None:
    options = replace(SMALL, num_groups=1, layout="orthogonal", num_users=1, comparisons_per_user=20_000)
    options = replace(options, noise=noise, ties=ties)
    judged = simulate(POOLS, options).judged["train"]
    probs = np.exp(outcome_log_probs(judged.margins[:, 0], options))
    np.testing.assert_allclose(probs.sum(axis=0), 1.0)
    for outcome, answer in enumerate((1, -1, 0)):
        assert (judged.answer == answer).mean() == pytest.approx(probs[outcome].mean(), abs=0.012)
    assert np.corrcoef(judged.answer, judged.margins[:, 0])[0, 1] > 0.3


def test_noise_turns_answers_around_and_davidson_is_bradley_terry_without_ties() -> None:
    plain, noisy = SimulationOptions(), SimulationOptions(noise=0.25)
    margin = np.linspace(-4, 4, 9)
    p = 1 / (1 + np.exp(-margin))
    np.testing.assert_allclose(np.exp(outcome_log_probs(margin, plain))[0], p)
    np.testing.assert_allclose(np.exp(outcome_log_probs(margin, noisy))[0], 0.75 * p + 0.25 * (1 - p))
    tie = np.exp(outcome_log_probs(np.zeros(1), SimulationOptions(ties=2.0)))[2]
    np.testing.assert_allclose(tie, 0.5)


def test_the_bayes_rule_is_what_enumeration_gives() -> None:
    """Independent path: plain probabilities, one user and one row at a time."""
    options = replace(SMALL, num_groups=3, layout="orthogonal", noise=0.1, ties=0.4)
    found = simulate(POOLS, options, seed=3)
    train, test = found.judged["train"], found.judged["test"]
    accuracy, loss = [], []
    for row in np.flatnonzero(test.answer != 0):
        posterior = np.full(3, 1 / 3)
        for known, k in itertools.product(np.flatnonzero(train.user == test.user[row]), range(3)):
            half = np.exp(train.margins[known, k] / 2)
            total = half + 1 / half + 0.4
            p = {1: half / total, -1: 1 / half / total, 0: 0.4 / total}
            answer = train.answer[known]
            posterior[k] *= p[0] if answer == 0 else 0.9 * p[answer] + 0.1 * p[-answer]
        posterior /= posterior.sum()
        half = np.exp(test.margins[row] / 2)
        win, lose = half / (half + 1 / half + 0.4), 1 / half / (half + 1 / half + 0.4)
        win, lose = 0.9 * win + 0.1 * lose, 0.9 * lose + 0.1 * win
        q = posterior @ win / (posterior @ (win + lose))
        taste = found.weights[test.user[row]].argmax()
        truth = win[taste] / (win[taste] + lose[taste])
        accuracy.append(truth if q > 0.5 else 1 - truth)
        loss.append(-truth * np.log(q) - (1 - truth) * np.log(1 - q))
    result = oracle(found)
    assert result.bayes.accuracy == pytest.approx(np.mean(accuracy))
    assert result.bayes.log_loss == pytest.approx(np.mean(loss))
    assert result.known_user.log_loss <= result.bayes.log_loss <= result.population.log_loss


def test_a_continuous_users_posterior_agrees_with_quadrature() -> None:
    """Two tastes: a Dirichlet distribution is a Beta distribution, integrated on a grid."""
    options = replace(SMALL, alpha=1.0, num_users=20)
    found = simulate(POOLS, options, seed=1)
    train, test = found.judged["train"], found.judged["test"]
    grid = (np.arange(4000) + 0.5) / 4000
    loss = []
    truths = true_probability(test, found.weights[test.user], options)
    for row in range(len(test.user)):
        known = train.user == test.user[row]
        p = 1 / (1 + np.exp(-train.margins[known] * train.answer[known, None]))
        posterior = (p[:, :1] * grid + p[:, 1:] * (1 - grid)).prod(axis=0)
        p = 1 / (1 + np.exp(-test.margins[row]))
        q = (posterior / posterior.sum()) @ (p[0] * grid + p[1] * (1 - grid))
        loss.append(-truths[row] * np.log(q) - (1 - truths[row]) * np.log(1 - q))
    assert oracle(found).bayes.log_loss == pytest.approx(np.mean(loss), abs=2e-3)


def test_two_opposed_groups_have_the_known_bayes_accuracy() -> None:
    for each, expected in ((2, 0.706), (16, 0.781)):
        options = SimulationOptions(num_users=4000 // each, comparisons_per_user=each, test_per_user=each)
        result = oracle(simulate(feature_pools(8), options))
        assert result.bayes.accuracy == pytest.approx(expected, abs=0.012)
        assert result.population.accuracy == 0.5


def test_log_linear_users_judge_by_their_mean_reward() -> None:
    options = replace(SMALL, alpha=2.0, combination="log_linear")
    found = simulate(POOLS, options)
    judged = found.judged["test"]
    margin = (judged.margins * found.weights[judged.user]).sum(axis=1)
    truth = true_probability(judged, found.weights[judged.user], options)
    np.testing.assert_allclose(truth, 1 / (1 + np.exp(-margin)))


def test_written_rows_are_sound_and_do_not_hold_the_truth(tmp_path) -> None:
    found = simulate(argument_pools(), replace(SMALL, ties=0.5, num_groups=3, layout="orthogonal"))
    truth = write_simulated(tmp_path / "new", found)
    report = validate(str(tmp_path / "new" / "train.jsonl"))
    assert report.rows == 48
    assert report.dropped["tie"] == (found.judged["train"].answer == 0).sum() > 0
    assert report.groups == 0
    assert report.extra_columns == []
    assert json.loads((tmp_path / "new" / "truth.json").read_text()) == json.loads(json.dumps(truth))
    assert set(truth["oracle"]) == {"test", "new_users"}
    with pytest.raises(ValueError, match="exists"):
        write_simulated(tmp_path / "new", found)
    write_simulated(tmp_path / "labelled", simulate(POOLS, replace(SMALL, num_new_users=0)), with_group=True)
    assert validate(str(tmp_path / "labelled" / "train.jsonl")).groups == 2
    assert not (tmp_path / "labelled" / "new_users.jsonl").exists()
    features = json.loads((tmp_path / "labelled" / "features.json").read_text())
    assert features["train text 3"] == pytest.approx(POOLS["train"].attributes[3].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layout": "round"},
        {"noise": 0.5},
        {"cosine": 1.0},
        {"alpha": 0.0},
        {"num_groups": 5, "layout": "orthogonal"},
        {"num_groups": 4, "layout": "shared"},
        {"num_users": 0},
        {"ties": -1.0},
    ],
)
def test_what_cannot_be_planted_is_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        simulate(POOLS, replace(SMALL, **wrong))


def test_debates_that_lose_a_side_are_left_out() -> None:
    short = argument_pools(max_words=30)["train"]
    assert 0 < len(short.prompts) < len(argument_pools()["train"].prompts)
    assert max(len(text.split()) for text in short.texts) <= 30
    with pytest.raises(ValueError, match="max_words=3"):
        argument_pools(max_words=3)
