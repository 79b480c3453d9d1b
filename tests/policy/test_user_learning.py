"""`adapt` where rates are learnt by annotator: a user's own rate and weights maximise evidence + log prior."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from prefmix.mixture.annotator_noise import BetaPrior
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_policy import MixturePolicy

F64 = torch.float64
TEXTS = [" The sky is blue.", " The sky is green.", " In the sky.", " In the sea.", " I loved the film."]
PROMPT = "What color is the sky?"
PRIOR = (1.5, 3.0)
LEARNT: dict[str, Any] = {"label_noise_update": "per_annotator", "label_noise_prior": PRIOR}
LATENTS: list[tuple[str, tuple[str, ...]]] = [("user", ("global",)), ("pair", ("global", "user"))]

Rows = list[dict[str, Any]]


@pytest.fixture
def make_noisy(make_policy: Callable[..., MixturePolicy]) -> Callable[..., MixturePolicy]:
    """A policy whose training learnt a rate for each annotator; its experts are sure of themselves."""

    def build(latent: str = "user", terms: tuple[str, ...] = ("global",)) -> MixturePolicy:
        policy = make_policy(latent, list(terms), label_noise=0.3, scale=4.0)
        policy.config = replace(policy.config, **LEARNT, beta=(0.5, 0.5, 0.5))
        policy.users.noise = torch.tensor([0.05, 0.3], dtype=F64)
        return policy

    return build


def pairs() -> Rows:
    """Every pair of texts once."""
    return [{"prompt": PROMPT, "chosen": a, "rejected": b} for i, a in enumerate(TEXTS) for b in TEXTS[i + 1 :]]


def reverse(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}


def margins_of(policy: MixturePolicy, rows: Rows) -> torch.Tensor:
    return torch.tensor([score["rewards/margins"] for score in policy.score(rows)], dtype=F64)


def answers(policy: MixturePolicy, expert: int, wrong: int) -> Rows:
    """What somebody says who judges as one expert, but for the first `wrong` pairs."""
    margins = margins_of(policy, pairs())[:, expert]
    right = [row if margin > 0 else reverse(row) for row, margin in zip(pairs(), margins, strict=True)]
    return [reverse(row) for row in right[:wrong]] + right[wrong:]


def log_lik_at(margins: torch.Tensor, rate: float) -> torch.Tensor:
    return (((1 - rate) * margins.sigmoid()) + rate * (-margins).sigmoid()).log()


def log_prior(rate: float) -> float:
    return float(BetaPrior(*PRIOR).log_density(torch.tensor(rate, dtype=F64)))


def test_rate_and_weights_are_the_maximum_under_a_user_latent(make_noisy: Callable[..., MixturePolicy]) -> None:
    policy = make_noisy()
    rows = answers(policy, 1, wrong=3)
    margins, gate = margins_of(policy, rows), policy.gate_weights().log()

    def objective(rate: float) -> float:
        return float(torch.logsumexp(gate + log_lik_at(margins, rate).sum(0), 0)) + log_prior(rate)

    weights = policy.adapt("carol", rows)
    rate = float(policy.users.noise[2])
    assert policy.users.rate("carol") == rate and policy.users.rate("anna") == 0.05 and policy.users.rate("?") is None
    grid = torch.linspace(1e-4, 0.4999, 2001, dtype=F64).tolist()
    assert rate == pytest.approx(max(grid, key=objective), abs=5e-4)
    assert abs(rate - policy.config.label_noise) > 0.03  # not the mean of the others
    expected = (gate + log_lik_at(margins, rate).sum(0)).softmax(0)
    torch.testing.assert_close(weights, expected, atol=1e-4, rtol=0)
    (score,) = policy.score([rows[0] | {"user": "carol"}])
    assert score["probabilities"] == pytest.approx(log_lik_at(margins[0], rate).exp().tolist(), abs=1e-4)


def test_rate_and_weights_are_a_maximum_under_a_pair_latent(make_noisy: Callable[..., MixturePolicy]) -> None:
    policy = make_noisy("pair", ("global", "user"))
    rows, gate = answers(policy, 1, wrong=3), policy.model.gate
    margins, population = margins_of(policy, rows), gate.population_log_weights().double()

    def objective(offsets: torch.Tensor, rate: float) -> float:
        log_weights = (population + offsets).log_softmax(0)
        prior = float(gate.user_strength * population.exp() @ log_weights) + log_prior(rate)
        return float(torch.logsumexp(log_weights + log_lik_at(margins, rate), dim=1).sum()) + prior

    policy.adapt("carol", rows)
    population, offsets, rate = population.detach(), gate.user[2].detach().double(), float(policy.users.noise[2])
    best = objective(offsets, rate)
    assert 0.01 < rate < 0.49
    for step in (-0.02, 0.02):
        assert objective(offsets, rate + step) < best
        for direction in torch.eye(3, dtype=F64):
            assert objective(offsets + step * direction, rate) < best + 1e-6


@pytest.mark.parametrize(("latent", "terms"), LATENTS)
def test_who_answers_at_random_is_found_out_and_tells_nothing(
    make_noisy: Callable[..., MixturePolicy], latent: str, terms: tuple[str, ...]
) -> None:
    """Every pair both ways: the best rate is 1/2, at which every expert says the same."""
    policy = make_noisy(latent, terms)
    rows = [row for pair in pairs() for row in (pair, reverse(pair))] * 3
    prior = policy.gate_weights()
    weights = policy.adapt("random", rows)
    assert policy.users.noise[2] > 0.45
    torch.testing.assert_close(weights, prior.double(), atol=0.03, rtol=0)
    before = make_noisy(latent, terms)
    before.config = replace(before.config, label_noise_update="fixed", label_noise_prior=None)
    assert (before.adapt("random", rows) - prior).abs().max() > 0.1  # at the mean rate of the others
    assert before.users.noise[2].isnan()
    careful = policy.adapt("careful", answers(policy, 1, wrong=0) * 3)
    assert policy.users.noise[3] < 0.06 and careful.argmax() == 1


def test_later_comparisons_add_to_earlier_ones(make_noisy: Callable[..., MixturePolicy]) -> None:
    policy = make_noisy()
    rows = answers(policy, 1, wrong=3)
    policy.adapt("whole", rows * 2)
    policy.adapt("twice", rows)
    once = float(policy.users.noise[3])
    policy.adapt("twice", rows)
    whole, twice = policy.users.noise[2:].tolist()
    assert abs(twice - whole) < 0.02 and abs(twice - whole) < 0.5 * abs(once - whole)
    policy.forget("twice")
    policy.adapt("twice", rows)
    assert float(policy.users.noise[3]) == pytest.approx(once)


def test_the_prior_is_saved_and_policies_without_it_load(
    make_noisy: Callable[..., MixturePolicy], tmp_path: Any
) -> None:
    policy = make_noisy()
    policy.save_pretrained(tmp_path / "policy")
    assert MixturePolicy.from_pretrained(tmp_path / "policy", device="cpu").config.label_noise_prior == PRIOR
    values = json.loads(policy.config.to_json())
    for bad in ({"label_noise_prior": [0.5, 2.0]}, {"label_noise_prior": None}, {"label_noise_update": "fixed"}):
        with pytest.raises(ValueError, match="label_noise_prior="):
            PolicyConfig.from_json(json.dumps(values | bad))
    del values["label_noise_prior"], values["label_noise_update"]
    assert PolicyConfig.from_json(json.dumps(values)).label_noise_update == "fixed"
    unknown = tmp_path / "unknown"
    policy.save_pretrained(unknown, user_state=False)
    stranger = MixturePolicy.from_pretrained(unknown, device="cpu")
    stranger.adapt("carol", answers(stranger, 1, wrong=3))
    assert stranger.users.noise is not None and not stranger.users.noise[-1].isnan()


def test_the_margins_are_those_of_experts_who_differ(make_noisy: Callable[..., MixturePolicy]) -> None:
    """What the tests above rest on."""
    margins = margins_of(make_noisy(), pairs())
    assert float(logsigmoid(margins.abs()).exp().mean()) > 0.75
    assert len({tuple(column) for column in (margins > 0).T.tolist()}) == 3
