"""The search over K on planted linear tastes: it finds them, holds users out whole, and obeys its own rule."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from prefmix.data.simulated_texts import feature_pools
from prefmix.data.simulation import simulate
from prefmix.data.simulation_options import SimulationOptions
from prefmix.experiments import choose_k as module
from prefmix.experiments.choose_k import choose_k, new_user_evidence
from prefmix.experiments.choose_k_report import ChoiceReport
from prefmix.experiments.confirm_k import best_two
from prefmix.experiments.effective_parameters import effective_parameters
from prefmix.experiments.prune import prune
from prefmix.mixture.linear_em import ProbeData, fit_linear_em


def planted(num_groups: int, users: int = 60, each: int = 12, seed: int = 0) -> ProbeData:
    options = SimulationOptions(
        num_groups=num_groups, layout="orthogonal", num_users=users, comparisons_per_user=each, scale=3.0
    )
    judged = simulate(feature_pools(3, num_prompts=4, texts_per_prompt=20), options, seed).judged["train"]
    difference = torch.from_numpy(judged.difference * judged.answer[:, None])
    return ProbeData(difference, torch.from_numpy(judged.user), torch.ones(len(difference)).double(), users)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_planted_numbers_of_groups_are_found(num_groups: int) -> None:
    choice = choose_k(planted(num_groups), range(1, 5), ridge=1.0)
    assert choice.num_experts == choice.by_pruning == choice.by_bic == num_groups
    assert [c.num_experts for c in choice.candidates] == [1, 2, 3, 4]


def test_the_smallest_k_within_one_standard_error_wins() -> None:
    choice = choose_k(planted(2, seed=3), (1, 2, 3), ridge=1.0, folds=3)
    for entry in choice.candidates:
        within = entry.worse_by <= entry.standard_error
        assert (
            within
            if entry.num_experts == choice.num_experts
            else (entry.num_experts > choice.num_experts or not within)
        )
    best = next(c for c in choice.candidates if c.num_experts == choice.best)
    assert best.worse_by == best.standard_error == 0.0
    assert all(c.held_out <= best.held_out for c in choice.candidates)


def test_every_user_is_held_out_whole_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data, trained = planted(2, users=20), []

    def spy(part: ProbeData, *args: object, **options: object) -> object:
        trained.append(set(part.group.tolist()))
        return fit_linear_em(part, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fit_linear_em", spy)
    scored: list[set[int]] = []
    real = module.new_user_evidence

    def spy_score(part: ProbeData, *args: object) -> torch.Tensor:
        scored.append(set(part.group.tolist()))
        return real(part, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "new_user_evidence", spy_score)
    choose_k(data, (1, 2), ridge=1.0, folds=4)
    for k in range(2):
        folds = list(zip(trained[4 * k : 4 * k + 4], scored[4 * k : 4 * k + 4]))
        assert all(not fit & held_out and len(fit | held_out) == 20 for fit, held_out in folds)
        assert sorted(user for _, held_out in folds for user in held_out) == list(range(20))


def test_the_search_stops_when_more_groups_only_cost() -> None:
    data = planted(1, users=40)
    stopped = choose_k(data, range(1, 7), ridge=1.0, patience=2)
    assert [c.num_experts for c in stopped.candidates] == [1, 2, 3]
    flat = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 2.1]), torch.tensor([1.0, 0.0, 2.0])]
    assert not module._hopeless(flat, 1)  # worse, but within its standard error
    assert module._hopeless([flat[0], flat[0] - 1.0, flat[0] - 1.0 - 0.1 * flat[0]], 2)
    assert not module._hopeless([flat[0], flat[0] - 1.0], None)


def test_evidence_of_a_new_user_is_the_sum_over_experts_of_products() -> None:
    data = planted(2, users=4, each=3)
    taste = np.random.default_rng(0).normal(size=(2, 3))
    log_weights = np.log([0.3, 0.7])
    found = new_user_evidence(data, torch.from_numpy(log_weights), torch.from_numpy(taste))
    for user in range(4):
        rows = data.difference.numpy()[data.group.numpy() == user]
        log_lik = -np.log1p(np.exp(-rows @ taste.T)).sum(axis=0)
        assert float(found[user]) == pytest.approx(logsumexp(log_lik + log_weights))


def test_a_ridge_leaves_fewer_parameters() -> None:
    data = planted(2)
    resp = torch.full((60, 2), 0.5).double()
    taste = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    assert effective_parameters(data, resp, taste, 0.0) == pytest.approx(2 * 3 + 1)
    assert effective_parameters(data, resp, taste, 1e9) == pytest.approx(1.0, abs=1e-3)
    assert 1.0 < effective_parameters(data, resp, taste, 30.0) < 7.0


def test_merging_from_too_many_experts_ends_at_the_planted_number() -> None:
    data = planted(2, seed=1)
    fit = fit_linear_em(data, 5, torch.ones(1), anneal=1.0, generator=torch.Generator().manual_seed(0))
    assert prune(data, fit, 1.0) == 2


def test_users_are_told_what_is_missing() -> None:
    with pytest.raises(ValueError, match="5 users are too few"):
        choose_k(planted(1, users=5), (1, 2))
    with pytest.raises(ValueError, match="candidates"):
        choose_k(planted(1), ())


def test_the_report_has_a_table_a_picture_and_plain_json() -> None:
    choice = choose_k(planted(2), (1, 2, 3), ridge=1.0)
    report = ChoiceReport(choice, 720, 4)
    assert "2 <- chosen" in report.text()
    assert "4 rows name no user" in report.text()
    entries = report.to_dict()
    assert entries["num_experts"] == 2
    assert entries["probe"]["candidates"][0]["restart_agreement"] is None
    ElementTree.fromstring(report.svg())
    assert "chosen: 2" in report.svg()
    low, high = best_two(choice)
    assert 2 in (low, high) and low < high
    assert not math.isnan(choice.candidates[1].restart_agreement)
