"""Decoding with one trunk pass for K experts equals scoring, sequence by sequence."""

from __future__ import annotations

import pytest
import torch

from prefmix.experts.interface import PaddedTexts
from prefmix.experts.shared_base import SharedBaseExperts

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
CONTINUATIONS = torch.randint(3, 320, (3, 32), generator=torch.Generator().manual_seed(3))


def make_experts(model, head: str, num_experts: int = 4) -> SharedBaseExperts:
    experts = SharedBaseExperts(model, num_experts, head=head, rank=4)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in experts.head.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return experts


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, 5 - len(prompt) :] = torch.tensor(prompt)
        mask[row, 5 - len(prompt) :] = 1
    return ids, mask


def scored(experts: SharedBaseExperts, row: int) -> torch.Tensor:
    """[32, K] log-probabilities of the continuation's tokens, from scoring all its beginnings."""
    totals = []
    for length in range(1, 33):
        ids = torch.tensor([PROMPTS[row] + CONTINUATIONS[row, :length].tolist()])
        completion = torch.ones_like(ids)
        completion[:, : len(PROMPTS[row])] = 0
        totals.append(experts(PaddedTexts(ids, torch.ones_like(ids), completion)).log_probs[0].detach())
    return torch.diff(torch.stack(totals), dim=0, prepend=torch.zeros(1, experts.num_experts))


@pytest.mark.parametrize("head", ["hidden", "logit", "full"])
def test_equals_scoring_at_every_position(tiny_model, head):
    experts = make_experts(tiny_model, head)
    decoder = experts.decoder(*left_padded())
    found = []
    for position in range(32):
        log_probs = decoder.logits().log_softmax(-1)
        assert log_probs.shape == (3, 4, 320) and log_probs.dtype == torch.float32
        tokens = CONTINUATIONS[:, position]
        found.append(log_probs.gather(-1, tokens[:, None, None].expand(-1, 4, 1))[..., 0])
        decoder.append(tokens)
    for row in range(3):
        torch.testing.assert_close(torch.stack(found)[:, row], scored(experts, row), rtol=1e-5, atol=1e-3)


def test_one_trunk_pass_a_token_whatever_the_number_of_experts(tiny_model):
    experts = make_experts(tiny_model, "hidden", num_experts=8)
    calls = []
    tiny_model.model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    decoder = experts.decoder(*left_padded())
    for position in range(3):
        decoder.logits()
        decoder.append(CONTINUATIONS[:, position])
    assert calls == [(3, 5), (3, 1), (3, 1), (3, 1)]


@pytest.mark.parametrize("head", ["hidden", "logit", "full"])
def test_chosen_experts_are_slices_in_the_order_given(tiny_model, head):
    experts = make_experts(tiny_model, head)
    everything, some = experts.decoder(*left_padded()), experts.decoder(*left_padded(), experts=[2, 0])
    torch.testing.assert_close(some.logits(), everything.logits()[:, [2, 0]])


def test_selected_sequences_go_on_as_if_alone(tiny_model):
    experts = make_experts(tiny_model, "hidden")
    decoder, whole = experts.decoder(*left_padded()), experts.decoder(*left_padded())
    decoder.append(CONTINUATIONS[:, 0])
    whole.append(CONTINUATIONS[:, 0])
    index = torch.tensor([2, 0])
    decoder.select(index)
    torch.testing.assert_close(decoder.logits(), whole.logits()[index])
    decoder.append(CONTINUATIONS[index, 1])
    whole.append(CONTINUATIONS[:, 1])
    torch.testing.assert_close(decoder.logits(), whole.logits()[index])


def test_untrained_experts_decode_as_the_base(tiny_model):
    ids, mask = left_padded()
    logits = SharedBaseExperts(tiny_model, 2).decoder(ids, mask).logits()
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            expected = tiny_model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits[row], expected.expand(2, -1), rtol=1e-4, atol=1e-4)


def test_right_padded_prompts_are_refused(tiny_model):
    ids, mask = left_padded()
    with pytest.raises(ValueError, match="left"):
        SharedBaseExperts(tiny_model, 2).decoder(ids.flip(1), mask.flip(1))
