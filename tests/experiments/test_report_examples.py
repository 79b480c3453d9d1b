"""Prompts as a report shows them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prefmix.evaluation.evaluator import score_table
from prefmix.experiments.read_rows import all_texts
from prefmix.experiments.report_examples import MOST_LETTERS, find_disputes, readable
from prefmix.experts.base_model import BaseModel
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.preferences import preference_scores

SYSTEM = {"role": "system", "content": "Be kind. " * 10}


def test_a_prompt_has_what_was_asked_last_for_a_title() -> None:
    assert readable("Where is the sun?") == ("Where is the sun?",) * 2
    talk = [
        SYSTEM,
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Where is the sun?"},
    ]
    title, whole = readable(talk)
    assert title == "Where is the sun?"
    assert whole.startswith("system: Be kind.") and whole.endswith("assistant: Hi!\nuser: Where is the sun?")
    call = {"role": "assistant", "tool_calls": [{"name": "look"}]}  # no content
    assert readable([SYSTEM, call]) == (f"system: {SYSTEM['content']}\nassistant:",) * 2
    assert len(readable([{"role": "user", "content": "a" * 2 * MOST_LETTERS}])[0]) == MOST_LETTERS


def test_disputes_show_the_prompts_of_their_own_rows(tiny_base: BaseModel) -> None:
    assert tiny_base.tokenizer is not None
    experts, generator = SharedBaseExperts(tiny_base.model, 2, rank=2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    config = PolicyConfig((1.0, 1.0), "pair", "<base>", "0" * 64)
    policy = MixturePolicy(MixtureModel(experts, Gate(2, ("global",))), tiny_base.tokenizer, config)

    def shown(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
        scored = score_table(policy, rows)
        scores = preference_scores(all_texts(scored), scored.table, config)
        even = np.full((len(scored.table), 2), 0.5)
        found = find_disputes(policy, rows, scored.table, scores, even, names=False)
        return [(dispute.title, dispute.prompt, dispute.chosen.strip()) for dispute in found]

    asked = [[SYSTEM, {"role": "user", "content": f"Question {i}"}] for i in range(4)]
    talks = [
        {
            "prompt": prompt,
            **{side: [{"role": "assistant", "content": f"{side} {i}"}] for side in ("chosen", "rejected")},
        }
        for i, prompt in enumerate(asked)
    ]
    talks[1] |= {"tie": True}  # left out: rows after it keep their own prompts
    found = shown(talks)
    assert {title for title, _, _ in found} == {"Question 0", "Question 2", "Question 3"}
    for title, whole, chosen in found:
        assert whole.endswith(f"user: {title}") and whole.startswith("system: ") and chosen.endswith(title[-1])
    ids = tiny_base.tokenizer("Where is it?")["input_ids"]
    tokens = {"prompt_ids": ids, "chosen_ids": ids[:2], "rejected_ids": ids[1:3]}
    assert [dispute[:2] for dispute in shown([tokens])] == [("Where is it?",) * 2]
