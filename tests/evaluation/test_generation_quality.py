"""Samples are scored as they were drawn; KL, frontiers and win rates against what enumeration gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from prefmix.evaluation.generation_quality import (
    Frontier,
    language_figures,
    reward_columns,
    sample_responses,
    win_rate,
)
from prefmix.evaluation.rewards import length_reward
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy

PROMPTS = ["Where is the sun?", "The sky", "What color is the sea? It", "I"]


@pytest.fixture
def make_policy(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., MixturePolicy]:
    """Three experts with random heads that visibly differ, on a tiny base."""

    def build(scale: float = 0.6) -> MixturePolicy:
        generator = torch.Generator().manual_seed(7)
        experts, gate = SharedBaseExperts(make_tiny_model(), 3, rank=4, generator=generator), Gate(3, ("global",))
        with torch.no_grad():
            experts.head.up.add_(scale * torch.randn(experts.head.up.shape, generator=generator))
        config = PolicyConfig((0.1,) * 3, "user", "", "0" * 64, experts=experts.describe(), gate=gate.describe())
        return MixturePolicy(MixtureModel(experts, gate), tiny_tokenizer, config)

    return build


def test_log_probabilities_are_those_of_the_tokens_that_were_drawn(make_policy: Callable[..., MixturePolicy]) -> None:
    policy, weights = make_policy(), [0.2, 0.5, 0.3]
    call = {"each": 3, "weights": weights, "max_new_tokens": 6, "seed": 4}
    samples = sample_responses(policy, PROMPTS, decoder="mixture", **call)
    assert len(samples.responses) == 12 and samples.each == 3
    for i, ids in enumerate(samples.token_ids):
        prompt = policy.tokenizer(PROMPTS[samples.prompt[i]])["input_ids"]
        with torch.no_grad():
            base = policy.model.experts.base_model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(base, dim=-1)[torch.arange(len(ids)), torch.tensor(ids)].sum()
        assert samples.ref_log_probs[i] == pytest.approx(float(expected), abs=1e-4)
    mixed = torch.logsumexp(torch.tensor(weights).log() + torch.tensor(samples.expert_log_probs), dim=1)
    np.testing.assert_allclose(samples.log_probs, mixed.numpy(), atol=1e-6)
    again = sample_responses(policy, PROMPTS, decoder="mixture", **call)
    assert again.responses == samples.responses


def test_mean_log_ratio_is_the_kl_of_the_first_token(make_policy: Callable[..., MixturePolicy]) -> None:
    policy, weights = make_policy(scale=0.3), torch.tensor([0.2, 0.5, 0.3])
    samples = sample_responses(policy, PROMPTS[:1], each=1500, weights=weights.tolist(), max_new_tokens=1, seed=1)
    ids = torch.tensor([policy.tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        decoder = policy.model.experts.decoder(ids, torch.ones_like(ids))
        experts = torch.log_softmax(decoder.logits()[0], dim=-1)
        reference = torch.log_softmax(policy.model.experts.base_model(ids).logits[0, -1], dim=-1)
    mixed = torch.logsumexp(weights.log()[:, None] + experts, dim=0)
    ratio = mixed - reference
    kl = float((mixed.exp() * ratio).sum())
    error = float((mixed.exp() * (ratio - kl) ** 2).sum()) ** 0.5 / 1500**0.5
    assert abs(samples.log_ratio.mean() - kl) < 4 * error and kl > 4 * error


def test_order_of_prompts_survives_batching_by_length(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy()
    samples = sample_responses(policy, PROMPTS, each=2, max_new_tokens=4, seed=0, batch=4)
    assert samples.prompts == PROMPTS
    assert samples.prompt.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for i, ids in enumerate(samples.token_ids):
        prompt = policy.tokenizer(PROMPTS[samples.prompt[i]])["input_ids"]
        with torch.no_grad():
            logits = policy.model.experts.base_model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        scored = torch.log_softmax(logits, dim=-1)[torch.arange(len(ids)), torch.tensor(ids)].sum()
        assert samples.ref_log_probs[i] == pytest.approx(float(scored), abs=1e-4)
    np.testing.assert_array_equal(samples.by_prompt(np.arange(8)), [0.5, 2.5, 4.5, 6.5])
    columns = reward_columns(samples, {"length": length_reward, "prompt": lambda p, r: np.array([len(x) for x in p])})
    assert columns.shape == (8, 2)
    np.testing.assert_array_equal(columns[:, 1], np.repeat([len(p) for p in PROMPTS], 2))


def test_perplexity_is_of_the_reference_and_one_where_it_is_certain(make_policy: Callable[..., MixturePolicy]) -> None:
    samples = sample_responses(make_policy(), PROMPTS, each=2, max_new_tokens=4)
    figures = language_figures(samples)
    tokens = sum(len(ids) for ids in samples.token_ids)
    assert figures.perplexity == pytest.approx(np.exp(-samples.ref_log_probs.sum() / tokens))
    assert language_figures(samples._replace(ref_log_probs=np.zeros(8))).perplexity == 1
    assert figures.tokens == tokens / 8


def test_win_rate_counts_ties_half_and_pairs_within_prompts() -> None:
    first, second = np.array([[1.0, 3.0], [0.0, 0.0]]), np.array([[2.0], [0.0]])
    found = win_rate(first, second)
    assert found.mean == 0.5 and found.clusters == 2
    assert win_rate(second + 10, first).mean == 1


def test_frontier_interpolates_between_neighbours_and_never_beyond() -> None:
    rewards = np.array([[0.0, 0.0], [2.0, 4.0], [3.0, 3.0]])[:, :, None]
    frontier = Frontier(np.array([[0.0, 0.0], [1.0, 3.0], [5.0, 3.0]]), rewards)
    assert frontier.mean_kl.tolist() == [0, 2, 4]
    assert frontier.at_kl(1).tolist() == [1.5]
    assert frontier.at_kl(2).tolist() == [3]
    assert frontier.at_kl(99).tolist() == [3]
    drawn = frontier.drawn(np.array([0, 0]))
    assert drawn.mean_kl.tolist() == [0, 1, 5] and drawn.at_kl(0.5).tolist() == [1]


def test_other_decoders_are_refused(make_policy: Callable[..., MixturePolicy]) -> None:
    with pytest.raises(ValueError, match="only sample and mixture"):
        sample_responses(make_policy(), PROMPTS, decoder="top")
