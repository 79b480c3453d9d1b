"""Which process holds which expert, and what one process alone gives (several: tests/distributed)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefmix.experts.independent import IndependentExperts
from prefmix.experts.interface import PaddedTexts
from prefmix.experts.spread_experts import SpreadExperts, experts_of_process


@pytest.mark.parametrize(("num_experts", "processes"), [(1, 1), (3, 1), (3, 2), (4, 2), (5, 3), (4, 4)])
def test_every_expert_lives_on_one_process(num_experts: int, processes: int) -> None:
    places = [experts_of_process(num_experts, processes, index) for index in range(processes)]
    assert sorted(expert for place in places for expert in place) == list(range(num_experts))
    assert max(map(len, places)) - min(map(len, places)) <= 1


def test_a_process_without_an_expert_is_refused() -> None:
    with pytest.raises(ValueError, match="start at most 2 processes"):
        experts_of_process(2, 3, 0)


def test_one_process_has_the_same_numbers_and_gradients(make_tiny_model: Callable[..., Any]) -> None:
    own = IndependentExperts([make_tiny_model(1), make_tiny_model(2)], make_tiny_model())
    spread = SpreadExperts(own, 2, 1, 0).train()
    ids = torch.randint(4, 320, (3, 7), generator=torch.Generator().manual_seed(0))
    texts = PaddedTexts(ids, torch.ones_like(ids), (torch.arange(7) >= 3).long().expand(3, -1))
    learners = torch.tensor([[True, False], [True, True], [False, True]])
    for found, expected in ((spread(texts), own(texts)), (spread.for_learners(texts, learners),
                                                          own.for_learners(texts, learners))):  # fmt: skip
        assert torch.equal(found.log_probs, expected.log_probs)
        assert torch.equal(found.ref_log_probs, expected.ref_log_probs)
        parameters = [p for p in own.models.parameters() if p.requires_grad]
        gradients = [torch.autograd.grad(part.log_probs.square().sum(), parameters) for part in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert spread.describe() == own.describe()


def test_what_one_process_cannot_do_is_said(make_tiny_model: Callable[..., Any]) -> None:
    spread = SpreadExperts(IndependentExperts([make_tiny_model(1)], make_tiny_model()), 1, 1, 0)
    with pytest.raises(ValueError, match="load the saved policy"):
        spread.decoder(torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="expert 1 lives on process 0"):
        spread.expert_state(1)
