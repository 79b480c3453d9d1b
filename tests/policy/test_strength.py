"""Strength multiplies what an expert adds to the logits, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from prefmix.policy.strength import at_strength

if TYPE_CHECKING:
    from prefmix.policy.mixture_policy import MixturePolicy

IDS = torch.tensor([[5, 9, 17, 33]])


def _logits(policy: MixturePolicy) -> torch.Tensor:
    return policy.model.experts.decoder(IDS, torch.ones_like(IDS)).logits()[0]


@pytest.mark.parametrize("head", ["hidden", "logit"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 3.0])
def test_logits_move_on_the_line_from_the_reference(
    make_policy: Callable[..., MixturePolicy], head: str, strength: float
) -> None:
    policy = make_policy(head=head)
    with torch.no_grad():
        reference = policy.model.experts.base_model(IDS).logits[0, -1]
    before = _logits(policy)
    expected = reference + strength * (before - reference)
    torch.testing.assert_close(_logits(at_strength(policy, strength)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(_logits(policy), before)
    assert float((before - reference).abs().max()) > 0.1


def test_users_and_gate_stay(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy()
    torch.testing.assert_close(at_strength(policy, 2).weights(user="anna"), policy.weights(user="anna"))


def test_full_heads_and_negative_strengths_are_refused(make_policy: Callable[..., MixturePolicy]) -> None:
    with pytest.raises(ValueError, match="low-rank heads"):
        at_strength(make_policy(head="full"), 2)
    with pytest.raises(ValueError, match="strength=-1"):
        at_strength(make_policy(), -1)
