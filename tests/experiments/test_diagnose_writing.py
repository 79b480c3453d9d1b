"""Experts that loop are found by what they write, those at the reference are not; the reference writes as the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from prefmix.evaluation.generation_quality import sample_responses
from prefmix.evaluation.reference import reference_policy
from prefmix.experiments.diagnose_writing import PROMPTS, RESPONSES, Writing, judge_writing, writing
from prefmix.experts.branches import BranchedExperts
from prefmix.experts.independent import IndependentExperts
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy

ROWS = [
    {"prompt": f"Where is the {place}?", "chosen": " In the sky.", "rejected": " No."}
    for place in ("sun", "sea", "sky")
]
PLAIN = Writing(kl=0.1, perplexity=20.0, repetition=0.02, responses=8)


def _policy(experts: AbstractExperts, tokenizer: Any) -> MixturePolicy:
    gate = Gate(experts.num_experts, ("global",))
    described = {"experts": experts.describe(), "gate": gate.describe()}
    config = PolicyConfig((0.1,) * experts.num_experts, "pair", "tiny", "0", **described)
    return MixturePolicy(MixtureModel(experts, gate), tokenizer, config)


def test_an_expert_in_a_loop_is_named_and_one_at_the_reference_is_not(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    experts = SharedBaseExperts(make_tiny_model(), 2, head="full")
    policy = _policy(experts, tiny_tokenizer)
    fine = writing(policy, ROWS)
    assert fine is not None and fine.level == "fine", fine
    # At the reference both experts and the reference draw the same tokens from the same seed.
    assert fine.how_much["kl_per_token_0"] == pytest.approx(0.0, abs=1e-5)
    assert fine.how_much["repetition_1"] == fine.how_much["reference_repetition"]
    word, state = tiny_tokenizer(" sky")["input_ids"][0], experts.expert_state(1)
    (name,) = state
    states = experts.base_model.model(torch.tensor([[word]])).last_hidden_state[0, -1]
    state[name][word] += 20.0 * states / states.norm()  # whatever was read, the same word comes next
    state[name][word] += 200.0 * torch.sign(state[name][word].mean())
    experts.load_expert_state(1, state)
    looped = writing(policy, ROWS)
    assert looped is not None and looped.level == "warning", looped
    assert "expert 1" in looped.what and "expert 0" not in looped.what and "at_strength" in looped.remedy
    assert "over 9 responses an expert" in looped.what  # three to each of three prompts
    assert RESPONSES == 8 and len(ROWS) < PROMPTS


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (PLAIN._replace(repetition=0.3), "repeats itself: 30%"),
        (PLAIN._replace(perplexity=90.0), "perplexity under it 90, the reference's own 20"),
        (PLAIN._replace(kl=1.2), "KL 1.20 nats a token"),
        (PLAIN._replace(repetition=0.2, perplexity=70.0, kl=0.9), ""),
    ],
)
def test_each_threshold_has_a_case_above_and_one_below(own: Writing, said: str) -> None:
    found = judge_writing([PLAIN, own], PLAIN)
    assert found.level == ("warning" if said else "fine")
    assert said in found.what and "expert 0" not in found.what


def test_the_reference_of_every_kind_of_experts_is_the_base(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    base, generator = make_tiny_model(), torch.Generator().manual_seed(0)
    plain = reference_policy(_policy(SharedBaseExperts(make_tiny_model(), 1, rank=1), tiny_tokenizer))
    assert plain is not None
    drawn = sample_responses(plain, ["The sky", "In"], max_new_tokens=8)
    branched = BranchedExperts(base, 2, branch_depth=1, rank=2, trunk="lora", generator=generator)
    for parameter in branched.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    for experts in (
        branched,
        IndependentExperts([make_tiny_model(seed=1), make_tiny_model(seed=2)], make_tiny_model()),
    ):
        found = reference_policy(_policy(experts, tiny_tokenizer))
        assert found is not None
        again = sample_responses(found, ["The sky", "In"], max_new_tokens=8)
        assert again.token_ids == drawn.token_ids
        np.testing.assert_allclose(again.log_probs, again.ref_log_probs, atol=1e-5)
        assert not any(parameter.requires_grad for parameter in experts.base_model.parameters())


def test_where_nothing_can_be_written_there_is_no_finding(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    policy = _policy(SharedBaseExperts(make_tiny_model(), 2, rank=2), tiny_tokenizer)
    tokens = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}]
    assert writing(policy, tokens) is None
    policy.tokenizer.model_max_length, before = 40, policy.tokenizer.model_max_length
    try:
        assert writing(policy, ROWS) is None  # no room for 48 tokens
    finally:
        policy.tokenizer.model_max_length = before
