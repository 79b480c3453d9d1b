"""The evaluator against an enumeration of users, experts and comparisons on a tiny model with random experts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from prefmix.data.tokenization import tokenize_rows
from prefmix.evaluation.evaluator import evaluate, score_table
from prefmix.evaluation.report import figures, new_users_note
from prefmix.evaluation.scoring import Predictions, score_rows
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.user_state import UserState

RESPONSES = ["It is blue.", "It is green.", "In the sea.", "Yes, it is.", "No, it is not.", "I loved the film."]
BETA = (0.3, 0.5)
NOISE = 0.05


def make_rows(users: list[str], per_user: int, seed: int = 0) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(seed), []
    for user in users:
        for _ in range(per_user):
            first, second = rng.choice(len(RESPONSES), size=2, replace=False)
            rows.append(
                {
                    "prompt": "What color is the sky?",
                    "chosen": " " + RESPONSES[first],
                    "rejected": " " + RESPONSES[second],
                    "user": user,
                    "group": "odd" if int(user[1:]) % 2 else "even",
                }
            )
    return rows


@pytest.fixture
def make_policy(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., MixturePolicy]:
    def build(latent: str = "user", terms: tuple[str, ...] = ("global",), names: tuple[str, ...] = ()) -> MixturePolicy:
        generator = torch.Generator().manual_seed(0)
        experts = SharedBaseExperts(make_tiny_model(), 2, rank=4, generator=generator)
        for parameter in experts.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        update = "closed_form" if terms == ("global",) else "gradient"
        gate = Gate(2, terms, num_users=len(names), update=update)
        with torch.no_grad():
            if terms == ("global",):
                gate.global_log_weights.copy_(torch.tensor([0.7, 0.3]).log())
            if "user" in terms:
                gate.user.copy_(torch.randn(gate.user.shape, generator=generator))
        config = PolicyConfig(
            experts=experts.describe(),
            gate=gate.describe(),
            beta=BETA,
            latent=latent,  # type: ignore[arg-type]
            base_source="tiny",
            base_sha256="0",
            label_noise=NOISE,
        )
        log_lik = -2 * torch.rand(len(names), 2, generator=generator)
        users = UserState(list(names), log_lik, torch.full((len(names),), 3.0))
        return MixturePolicy(MixtureModel(experts, gate), tiny_tokenizer, config, users)

    return build


def expert_probabilities(policy: MixturePolicy, row: dict[str, Any]) -> tuple[list[float], float]:
    """p_k of one comparison and the reference's difference, one text at a time and in plain Python."""
    log_probs = []
    experts = policy.model.experts
    for name in ("chosen", "rejected"):
        pair = policy.log_prob(row["prompt"], [row[name]], per_expert=True)[0]
        saved = [p.detach().clone() for p in experts.parameters() if p.requires_grad]
        for p in experts.parameters():
            if p.requires_grad:
                p.data.zero_()
        reference = policy.log_prob(row["prompt"], [row[name]], per_expert=True)[0]
        for p, value in zip([p for p in experts.parameters() if p.requires_grad], saved):
            p.data.copy_(value)
        log_probs.append((pair, reference))
    (chosen, ref_chosen), (rejected, ref_rejected) = log_probs
    probabilities = []
    for k, beta in enumerate(BETA):
        margin = beta * float((chosen[k] - ref_chosen[k]) - (rejected[k] - ref_rejected[k]))
        sigmoid = 1 / (1 + math.exp(-margin))
        probabilities.append((1 - NOISE) * sigmoid + NOISE * (1 - sigmoid))
    return probabilities, float(ref_chosen[0] - ref_rejected[0])


def check(figures: Any, probabilities: list[float]) -> None:
    hits = [1.0 if p > 0.5 else 0.0 for p in probabilities]
    assert figures.accuracy.mean == pytest.approx(np.mean(hits))
    assert figures.log_loss.mean == pytest.approx(-np.mean(np.log(probabilities)), abs=1e-5)


def test_population_and_known_users_equal_enumeration(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy(names=("u0", "u1"))
    rows = make_rows(["u0", "u1", "u2"], 4)
    report = evaluate(policy, rows)
    population, personal, reference = [], [], []
    for row in rows:
        p, ref_difference = expert_probabilities(policy, row)
        reference.append(ref_difference > 0)
        population.append(0.7 * p[0] + 0.3 * p[1])
        index = policy.users.index(row["user"])
        if index >= 0:
            joint = np.array([0.7, 0.3]) * np.exp(policy.users.log_lik[index].numpy())
            personal.append(float(joint @ p / joint.sum()))
    check(report.population, population)
    assert report.personalised is not None and report.num_known_rows == 8
    check(report.personalised, personal)
    untrained, likelier, _ = report.baselines
    assert likelier.accuracy.mean == pytest.approx(np.mean(reference))
    assert math.isnan(likelier.log_loss.mean) and math.isnan(likelier.ece)
    # No opinion is a tie in every row: half right by definition, whatever the reference finds likelier.
    assert untrained.accuracy.mean == 0.5 and untrained.ece == 0.0
    assert untrained.log_loss.mean == pytest.approx(math.log(2))


@pytest.mark.parametrize("shared", [True, False])
def test_new_users_get_bayes_rule_over_their_context(make_policy: Callable[..., MixturePolicy], shared: bool) -> None:
    policy = make_policy()
    context_rows = make_rows(["u4", "u5"], 3, seed=1)
    rows = make_rows(["u4", "u5"], 3, seed=2)
    report = evaluate(policy, rows, context_rows=None if shared else context_rows, new_user_context=(0, 2, 9))
    assert set(report.new_users) == {0, 2} and not report.new_users_met
    if shared:
        assert report.new_users[2].accuracy.num_rows == 2  # one of three rows of each person is left to score
        return
    curve = evaluate(policy, rows, context_rows=context_rows, new_user_context=(0, 2)).new_users
    assert curve[0].log_loss.mean == pytest.approx(report.population.log_loss.mean)
    # Which two of a person's three context rows are shown is drawn; one of the nine choices must explain the figure.
    choices = [_bayes(policy, context_rows, rows, (first, second)) for first in range(3) for second in range(3)]
    assert any(curve[2].log_loss.mean == pytest.approx(choice, abs=1e-5) for choice in choices)


def _bayes(policy: MixturePolicy, context: list[dict], rows: list[dict], left_out: tuple[int, int]) -> float:
    losses = []
    for person, skip in zip(("u4", "u5"), left_out):
        joint = np.array([0.7, 0.3])
        for i, row in enumerate([row for row in context if row["user"] == person]):
            if i != skip:
                joint = joint * expert_probabilities(policy, row)[0]
        weights = joint / joint.sum()
        losses += [-math.log(weights @ expert_probabilities(policy, row)[0]) for row in rows if row["user"] == person]
    return float(np.mean(losses))


def test_cached_states_and_token_ids_give_equal_scores(make_policy: Callable[..., MixturePolicy]) -> None:
    from prefmix.experts.base_model import BaseModel
    from prefmix.experts.trunk_cache import build_trunk_states

    policy = make_policy(names=("u0",))
    table = tokenize_rows(make_rows(["u0"], 8), policy.tokenizer, progress=False)
    base = BaseModel(policy.model.experts.base_model, policy.tokenizer, "tiny", "0")
    states = build_trunk_states(base, table.texts, mode="memory", progress=False)
    read = score_rows(policy.model.experts, table, beta=BETA)
    cached = score_rows(policy.model.experts, table, beta=BETA, states=states, tokens_per_chunk=10)
    torch.testing.assert_close(read.log_lik, cached.log_lik, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read.ref_logit, cached.ref_logit, atol=1e-4, rtol=1e-4)


def test_oracle_uses_the_expert_of_the_true_group(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy(names=("u0", "u1"))
    rows = make_rows(["u0", "u1"], 4)
    report = evaluate(policy, rows, true_groups=True)
    assert report.personalised is not None
    check(report.personalised, [expert_probabilities(policy, row)[0][int(row["group"] == "odd")] for row in rows])
    with pytest.raises(ValueError, match="true_groups"):
        evaluate(policy, [{k: v for k, v in row.items() if k != "group"} for row in rows], true_groups=True)


def test_groups_change_no_prediction(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy(names=("u0", "u1"))
    rows = make_rows(["u0", "u1", "u2"], 4)
    plain = [{k: v for k, v in row.items() if k != "group"} for row in rows]
    with_group, without = evaluate(policy, rows), evaluate(policy, plain)
    for way in ("population", "personalised"):
        np.testing.assert_array_equal(with_group.predictions[way].logit, without.predictions[way].logit)
    assert without.agreement is None and without.population.worst_group is None
    assert with_group.population.worst_group == min(with_group.population.by_group.values())


def test_pair_latent_without_a_user_term_does_not_personalise(make_policy: Callable[..., MixturePolicy]) -> None:
    report = evaluate(make_policy(latent="pair", names=("u0", "u1")), make_rows(["u0", "u1"], 4))
    assert report.personalised is None and not report.new_users


def test_pair_latent_with_a_user_term_uses_the_users_own_weights(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy(latent="pair", terms=("global", "user"), names=("u0", "u1"))
    rows = make_rows(["u0", "u1", "u2"], 4)
    report = evaluate(policy, rows, new_user_context=(0, 2))
    personal = []
    for row in rows:
        index = policy.users.index(row["user"])
        if index >= 0:
            weights = torch.softmax(policy.model.gate.user[index].detach(), 0).numpy()
            personal.append(float(weights @ np.array(expert_probabilities(policy, row)[0])))
    assert report.personalised is not None
    check(report.personalised, personal)
    assert set(report.new_users) == {0, 2} and not report.new_users_met


def test_report_is_json_and_readable(make_policy: Callable[..., MixturePolicy]) -> None:
    report = evaluate(make_policy(names=("u0", "u1")), make_rows(["u0", "u1", "u2"], 6))
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["num_comparisons"] == 18
    table = report.table()
    assert "population (gate only)" in table and "personalised (12 rows of known users)" in table and "ARI" in table
    assert "worst group" in table
    assert ": 1 context row " in table and "0 context rows" in table and "1 context rows" not in table
    # 18 rows of the third person alone, unknown to the policy: what is shown to it is not scored.
    assert "to show; with 0 shown it is the population's figure on these rows alone" in table


def test_new_people_who_are_few_are_called_so() -> None:
    def note(people: int) -> str:
        rows = np.arange(5 * people)
        found = figures(Predictions(np.full(len(rows), -0.5), np.ones(len(rows))), rows % people, rows * 0 - 1, ())
        return new_users_note({4: found}, "people met here")

    assert note(1).startswith("people met here: 5 rows of 1 person who has 4 other rows to show")
    assert "9 people who have" in note(9) and note(9).endswith("so few people that chance moves the figures")
    assert "chance" not in note(10)


def test_the_table_has_no_empty_column_where_rows_name_no_group(make_policy: Callable[..., MixturePolicy]) -> None:
    rows = [{**row, "group": None} for row in make_rows(["u0", "u1"], 6)]
    table = evaluate(make_policy(names=("u0", "u1")), rows).table()
    assert "worst group" not in table and "population (gate only)" in table


def test_the_longer_response_has_more_tokens_and_ties_count_half(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy(names=("u0",))
    rows = make_rows(["u0", "u1", "u2"], 6) + [{"prompt": "x", "chosen": " a", "rejected": " b", "user": "u0"}]
    report = evaluate(policy, rows)
    right = []
    for row in rows:
        chosen, rejected = (len(policy.tokenizer(row[side])["input_ids"]) for side in ("chosen", "rejected"))
        right.append(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0)
    assert right[-1] == 0.5 and 0.0 in right and 1.0 in right
    assert report.baselines.longer.accuracy.mean == pytest.approx(np.mean(right))
    assert report.to_dict()["baselines"]["longer"]["log_loss"]["mean"] is None
    line = next(line for line in report.table().splitlines() if line.startswith("longer response"))
    assert len(line.split()) == 6  # two words of the name, the accuracy, its interval in two, the worst group


def test_no_opinion_on_rankings_is_every_order_alike(make_policy: Callable[..., MixturePolicy]) -> None:
    rows = [
        {"prompt": "x", "ranking": [" a", " b c", " d"], "user": "u0"},
        {"prompt": "y", "chosen": " a", "rejected": " b", "user": "u0"},
    ]
    policy = make_policy()
    policy.config = replace(policy.config, label_noise=0.0)  # orders have no flipped labels
    untrained = evaluate(policy, rows).baselines.untrained
    assert untrained.log_loss.mean == pytest.approx((math.log(6) + math.log(2)) / 2)
    assert untrained.accuracy.mean == 0.5


def test_no_rows_is_an_error(make_policy: Callable[..., MixturePolicy], tiny_tokenizer: Any) -> None:
    table = tokenize_rows(make_rows(["u0"], 2), tiny_tokenizer, progress=False)
    with pytest.raises(ValueError, match="no comparison"):
        score_table(make_policy(), table.select(np.zeros(len(table), bool)))
