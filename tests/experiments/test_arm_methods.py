"""Every arm on a few rows; per-user DPO between its two ends; group DRO's adversary; what a soup is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.experiments.conftest import opposed_rows

from prefmix.data.comparisons import ComparisonTable
from prefmix.experiments.arm_methods import Workplace, fit
from prefmix.experiments.arm_predictions import NewUsers
from prefmix.experiments.arms import Arm, all_arms, standard_arms, with_options
from prefmix.experiments.baselines import tokenize_splits
from prefmix.experiments.per_user import labelled_by_user, own_expert_log_weights, users_with_expert
from prefmix.experts.base_model import BaseModel

OPTIONS: dict[str, Any] = {
    "num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "probe_dim": 4,
    "probe_restarts": 2, "cache_states": "memory", "expert_rank": 2, "lr_scheduler_type": "constant",
}  # fmt: skip


@pytest.fixture
def place(tiny_base: BaseModel, tmp_path: Path) -> Workplace:
    rows = opposed_rows()
    train, validation, test = (rows[start::5] for start in (0, 3, 4))
    new = [row | {"user": f"new {row['user']}"} for row in opposed_rows(4, 8, seed=1)]
    splits = tokenize_splits(train + rows[1::5] + rows[2::5], validation, test, tiny_base, new_users=new)
    return Workplace(tiny_base, splits, OPTIONS, tmp_path / "runs", 0)


@pytest.mark.parametrize("name", all_arms())
def test_every_arm_learns_and_predicts(name: str, place: Workplace) -> None:
    arm = all_arms(2, 2)[name]
    fitted, test = fit(arm, place), place.splits.test
    ways = fitted.predict(test, place.states(test))
    for predictions in ways:
        assert len(predictions.logit) == len(test) and np.isfinite(predictions.log_prob).all()
    assert place.splits.new_users is not None
    new = NewUsers.of(place.splits.new_users)
    by_size = fitted.predict_new(new, place.states(place.splits.new_users))
    assert list(by_size) == list(new.sizes) == [0, 1, 2, 4]
    assert all(len(predictions.logit) == new.scored.sum() for predictions in by_size.values())
    population = np.mean(ways.population.log_prob)
    if name in ("mixture", "oracle", "per_user", "probe", "low_rank_reward", "vpl", "hard_em_probe"):
        assert np.mean(ways.personalised.log_prob) > population
        assert (ways.personalised.logit > 0).mean() > 0.8
    if name in ("reference", "single", "robust", "group_robust", "mixed_logit", "soup"):
        np.testing.assert_array_equal(ways.personalised.logit, ways.population.logit)
        np.testing.assert_array_equal(by_size[0].logit, by_size[4].logit)
    assert not place.output_dir.exists() or not any(place.output_dir.iterdir())


def test_shrinkage_ends_at_single_dpo_and_none_lets_users_part(place: Workplace) -> None:
    arms = all_arms(2, 2)
    test = place.splits.test
    states = place.states(test)
    pulled = fit(with_options(arms["per_user"], "pulled", {"shrinkage": 1e9}), place).predict(test, states)
    single = fit(arms["single"], place).predict(test, states)
    np.testing.assert_allclose(pulled.personalised.logit, single.population.logit, atol=1e-5)
    free = fit(with_options(arms["per_user"], "free", {"shrinkage": 0.0}), place).predict(test, states)
    assert np.abs(free.personalised.logit - single.population.logit).max() > 0.1
    some = fit(with_options(arms["per_user"], "some", {"shrinkage": 30.0}), place).predict(test, states)
    far, near = (np.abs(ways.personalised.logit - single.population.logit).mean() for ways in (free, some))
    assert 0 < near < far


def test_a_user_without_an_expert_has_single_dpo(place: Workplace) -> None:
    test, arm = place.splits.test, with_options(all_arms(2, 2)["per_user"], "few", {"max_users": 2})
    fitted = fit(arm, place)
    ways = fitted.predict(test, place.states(test))
    own = users_with_expert(place.splits.train, 2)[test.user] >= 0
    assert fitted.notes["users_with_expert"] == 2 and 0 < own.sum() < len(own)
    np.testing.assert_array_equal(ways.personalised.logit[~own], ways.population.logit[~own])
    assert np.abs(ways.personalised.logit[own] - ways.population.logit[own]).max() > 0


def test_the_most_active_users_get_experts_and_their_rows_name_them(place: Workplace) -> None:
    train = place.splits.train
    busy = train.select(np.concatenate([np.flatnonzero(train.user == 3), np.flatnonzero(train.user == 1)[:2]]))
    expert = users_with_expert(busy, 1)
    assert expert[3] == 0 and (np.delete(expert, 3) == -1).all()
    labelled: ComparisonTable = labelled_by_user(busy, users_with_expert(busy, 5))
    assert set(labelled.group.tolist()) == {0, 1} and (labelled.group[labelled.user == 3] == 0).all()
    weights = own_expert_log_weights(np.array([1, -1]), 2).exp()
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64))


def test_group_robust_without_an_adversary_is_single_dpo_on_equal_groups(place: Workplace) -> None:
    """With eta = 0 and as many rows a group, every row weighs 1."""
    test, arms = place.splits.test, all_arms(2, 2)
    moving = fit(arms["group_robust"], place)
    assert 0.5 < moving.notes["largest_group_weight"] < 1
    assert len(set(np.bincount(place.splits.train.group).tolist())) == 1
    still = with_options(arms["group_robust"], "still", {"robust_step": 1e-12})
    robust, single = (fit(arm, place).predict(test, place.states(test)) for arm in (still, arms["single"]))
    np.testing.assert_allclose(robust.population.logit, single.population.logit, atol=1e-4)


def test_a_soup_is_the_mean_of_the_experts_effects(place: Workplace) -> None:
    souped = fit(all_arms(2, 2)["soup"], place).policy
    mixture = place.train(replace(all_arms(2, 2)["mixture"], name="again")).policy
    assert souped is not None
    one, many = souped.model.experts.head, mixture.model.experts.head
    weights = mixture.gate_weights()

    def effect(head: Any, expert: int) -> torch.Tensor:
        return head.up[expert].double() @ head.down[expert].double()

    mean = sum(float(weight) * effect(many, expert) for expert, weight in enumerate(weights))
    torch.testing.assert_close(effect(one, 0), mean, atol=1e-6, rtol=1e-5)


def test_own_arms_keep_to_their_method() -> None:
    arms = all_arms(3, 2)
    assert with_options(arms["mixture"], "four", {"num_experts": 4}).options["num_experts"] == 4
    over_users = with_options(arms["group_robust"], "users", {"robust_over": "user"})
    assert over_users.options["robust_over"] == "user" and not over_users.needs_groups
    assert with_options(arms["mixture"], "robust", {"robust_over": "group"}).needs_groups
    assert with_options(arms["oracle"], "long", {"num_train_epochs": 9}).needs_groups
    with pytest.raises(ValueError, match="shrinkage: a setting of 'per_user'"):
        with_options(arms["mixture"], "x", {"shrinkage": 1.0})
    assert isinstance(standard_arms(2, 2)["oracle"], Arm) and arms["oracle"].options["num_experts"] == 2
