"""Every check of trained experts has scores that trigger it, and a near miss that does not."""

from __future__ import annotations

import numpy as np
import pytest

from prefmix.experiments.diagnose_experts import (
    LearntNoise,
    ScoredRows,
    annotators,
    calibration,
    collapse,
    diagnose_scored,
    displacement,
    length_split,
    noise_or_minority,
    restart_agreement,
)

NUM_USERS, EACH = 60, 20


def _sigmoid(margin: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-margin))


def people(
    sizes: tuple[int, ...] = (30, 30),
    *,
    noise: tuple[float, ...] = (0.0, 0.0),
    taste: tuple[int, ...] | None = None,
    sure: float = 1.0,
    seed: int = 0,
) -> ScoredRows:
    """Users of expert k answer by a taste of their own or another expert's; experts' margins have deviation 2.

    Args:
        sizes: users of each expert.
        noise: share of answers that are turned around.
        taste: whose margins a group of users really follows.
        sure: factor on the margins that the policy reports.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    expert = np.repeat(np.repeat(np.arange(len(sizes)), sizes), EACH)
    user = np.repeat(np.arange(sum(sizes)), EACH)
    margins = rng.normal(scale=2.0, size=(len(user), len(sizes)))
    true = np.take_along_axis(margins, np.array(taste or range(len(sizes)))[expert][:, None], 1)[:, 0]
    says_first = (rng.random(len(user)) < _sigmoid(true)) != (rng.random(len(user)) < np.array(noise)[expert])
    margins *= sure * np.where(says_first, 1.0, -1.0)[:, None]
    weights = np.full((len(user), len(sizes)), 0.02 / max(len(sizes) - 1, 1))
    weights[np.arange(len(user)), expert] = 0.98
    weights /= weights.sum(axis=1, keepdims=True)
    length = rng.normal(size=len(user))
    return ScoredRows(0.5 * margins, -0.5 * margins, _sigmoid(margins), weights, user, length)


def test_sound_experts_give_no_warning() -> None:
    assert [f.check for f in diagnose_scored(people()) if f.level != "fine"] == []


def test_experts_that_die_or_repeat_each_other() -> None:
    sound = people()
    rare = np.tile([0.96, 0.04], (len(sound.user), 1))
    assert collapse(sound._replace(weights=rare)).level == "warning"
    assert collapse(sound._replace(weights=np.tile([0.94, 0.06], (len(rare), 1)))).level == "fine"
    noise = np.random.default_rng(1).normal(size=len(rare))
    for scale, level in ((0.01, "warning"), (1.0, "fine")):
        copied = sound.rewards_chosen.copy()
        copied[:, 1] = copied[:, 0] + scale * noise
        twins = sound._replace(rewards_chosen=copied, rewards_rejected=np.zeros_like(copied))
        assert collapse(twins).level == level


@pytest.mark.parametrize(("noise", "level"), [(0.5, "warning"), (1.5, "fine")])
def test_experts_that_merely_split_on_length(noise: float, level: str) -> None:
    sound = people()
    rng = np.random.default_rng(2)
    shared = rng.normal(scale=3.0, size=len(sound.user))
    split = sound.length_difference + noise * rng.normal(size=len(shared))
    margins = np.stack([shared + split, shared - split], axis=1)
    found = length_split(sound._replace(rewards_chosen=margins, rewards_rejected=np.zeros_like(margins)))
    assert found.level == level
    assert found.how_much["r2"] == pytest.approx(1 / (1 + noise**2), abs=0.06)


def test_a_taste_for_length_that_all_share_is_no_split() -> None:
    sound = people()
    margins = sound.margins + 5.0 * sound.length_difference[:, None]
    assert length_split(sound._replace(rewards_chosen=margins, rewards_rejected=0 * margins)).level == "fine"


def test_likelihood_displacement() -> None:
    sound = people()
    fallen = sound._replace(rewards_chosen=sound.rewards_chosen - 5.0, rewards_rejected=sound.rewards_rejected - 5.0)
    assert displacement(fallen).level == "warning"
    only_rejected = sound._replace(rewards_rejected=sound.rewards_rejected - 5.0)
    assert displacement(only_rejected).level == "fine"
    slightly = sound._replace(
        rewards_chosen=0 * sound.rewards_chosen - 0.1, rewards_rejected=0 * sound.rewards_chosen + 0.1
    )
    assert displacement(slightly).level == "fine"  # the rejected one did not fall


def test_careless_people_are_no_minority_and_a_true_minority_is_one() -> None:
    careless = people((50, 10), noise=(0.0, 0.35), taste=(0, 0), seed=3)
    found = noise_or_minority(careless)
    assert found.level == "warning"
    assert "label_noise" in found.remedy
    true = noise_or_minority(people((50, 10), seed=3))
    assert true.level == "fine"
    assert true.how_much["gain_over_noise"] > 0.1
    noisy_but_real = noise_or_minority(people((50, 10), noise=(0.0, 0.15), seed=3))
    assert noisy_but_real.level == "fine"
    assert noise_or_minority(people((30, 30), noise=(0.0, 0.4), taste=(0, 0))).level == "fine"  # no small group


@pytest.mark.parametrize("each", [True, False])
def test_where_noise_is_learnt_no_remedy_is_to_set_it(each: bool) -> None:
    """`label_noise` only says where a learnt rate starts."""
    learnt = LearntNoise(0.07, (1.2, 2.8), per_annotator=each)
    careless, sure = people((50, 10), noise=(0.0, 0.35), taste=(0, 0), seed=3), people((60,), noise=(0.0,), sure=2.0)
    unsure = people((60,), noise=(0.0,), sure=0.5)
    remedies = [noise_or_minority(careless, learnt).remedy, *(calibration(s, learnt).remedy for s in (sure, unsure))]
    assert not any(phrase in remedy for remedy in remedies for phrase in ("set label_noise,", "label_noise, lower"))
    assert remedies[0].endswith(
        "their rates are learnt already, so try one expert fewer" if each else "one expert fewer"
    )
    assert ("set label_noise_update: per_annotator" in remedies[0]) != each
    assert "now 0.07" in remedies[1] and "label_noise_prior more weight, such as [3, 9]" in remedies[1]
    assert "label_noise_prior with a lower mode" in remedies[2]
    found = {f.check: f.remedy for f in diagnose_scored(sure, learnt)}
    assert found["calibration"] == remedies[1]


@pytest.mark.parametrize(("sure", "level"), [(2.0, "warning"), (0.5, "warning"), (1.1, "fine"), (0.9, "fine")])
def test_probabilities_that_are_too_sure_or_not_enough(sure: float, level: str) -> None:
    found = calibration(people((60,), noise=(0.0,), sure=sure))
    assert found.level == level
    assert found.how_much["slope"] == pytest.approx(1 / sure, rel=0.15)


def test_the_slope_is_where_its_likelihood_is_largest() -> None:
    scored = people((60,), noise=(0.1,))
    p = scored.probability[:, 0]
    logit = np.log(p) - np.log1p(-p)
    grid = np.linspace(0.2, 1.5, 2601)
    log_lik = -np.logaddexp(0.0, -grid[:, None] * logit).sum(axis=1)
    best = grid[log_lik.argmax()]
    assert calibration(scored).how_much["slope"] == pytest.approx(best, abs=1e-3)


def test_restarts_that_find_other_groups_each_time() -> None:
    rng = np.random.default_rng(0)
    labels = [rng.integers(2, size=100) for _ in range(6)]
    assert restart_agreement(labels, list(range(6))).level == "warning"
    same = [labels[0] ^ (rng.random(100) < 0.03) for _ in range(3)] + labels[:3]
    # Starts that ended in worse optima do not count; label switching is no disagreement.
    same[1] = 1 - same[1]
    assert restart_agreement(same, [-1.0, -1.0, -1.0, -9.0, -9.0, -9.0]).level == "fine"
    assert restart_agreement(labels[:1], [0.0]).level == "note"


def test_annotators_at_random_are_counted_and_a_few_are_fine() -> None:
    rates = np.array([0.02, 0.05, np.nan, 0.45, 0.5])
    found = annotators(rates)
    assert found.level == "note" and found.how_much["nearly_random"] == pytest.approx(0.5)
    assert found.how_much["annotators"] == 4 and "50% of 4 annotators" in found.what
    assert annotators(np.array([0.3] * 19 + [0.45])).level == "fine"
    assert annotators(np.array([np.nan])).level == "fine"
