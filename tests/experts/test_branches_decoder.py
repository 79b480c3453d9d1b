"""Decoding with branches against the full forward of each expert, position by position."""

from __future__ import annotations

import pytest
import torch

from prefmix.experts.branches import BranchedExperts
from prefmix.experts.interface import PaddedTexts

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
CONTINUATIONS = [[20, 21, 22, 23, 24, 25], [30, 31, 32, 33, 34, 35], [40, 41, 42, 43, 44, 45]]


def moved(experts: BranchedExperts) -> BranchedExperts:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in experts.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return experts


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@torch.no_grad()
def full_logits(experts: BranchedExperts, tokens: list[int], expert: int) -> torch.Tensor:
    """Next-token log-probabilities of one expert after `tokens`, by scoring every token of the vocabulary in turn.

    Uses `forward` alone, so it shares no code of the decoder.
    """
    vocab = experts.output_head.weight.shape[0]
    ids = torch.tensor(tokens).expand(vocab, -1)
    ids = torch.cat([ids, torch.arange(vocab)[:, None]], dim=1)
    completion = torch.zeros_like(ids)
    completion[:, -1] = 1
    return experts(PaddedTexts(ids, torch.ones_like(ids), completion)).log_probs[:, expert]


@pytest.mark.parametrize(
    ("family", "depth", "head", "trunk"),
    [
        ("Llama", 1, "none", "frozen"),
        ("Llama", 3, "hidden", "frozen"),
        ("Llama", -1, "none", "frozen"),
        ("Llama", 2, "logit", "lora"),
        ("Llama", 0, "hidden", "lora"),
        ("Llama", 1, "none", "full"),
        ("Llama", 0, "full", "full"),
        ("Mistral", 1, "none", "frozen"),
        ("Gemma2", 1, "none", "frozen"),
        ("Gemma3", 1, "none", "frozen"),  # the only block with full attention lies above the branch
        ("Gemma3", 2, "none", "frozen"),
        ("Qwen2", 2, "none", "frozen"),
        ("Phi3", 1, "none", "frozen"),
        ("Olmo2", 1, "none", "frozen"),
        ("GPT2", 1, "none", "frozen"),
        ("GPT2", -1, "none", "frozen"),
    ],
)
def test_every_position_equals_the_full_forward(make_family_model, family, depth, head, trunk):
    experts = moved(BranchedExperts(make_family_model(family), 3, depth, head=head, rank=2, trunk=trunk))
    decoder = experts.decoder(*left_padded(PROMPTS))
    for position in range(len(CONTINUATIONS[0])):
        found = decoder.logits().log_softmax(-1)
        assert found.shape == (3, 3, 320)
        if position in (0, 2, 5):
            row, expert = position % 3, (position + 1) % 3
            expected = full_logits(experts, PROMPTS[row] + CONTINUATIONS[row][:position], expert)
            torch.testing.assert_close(found[row, expert], expected, rtol=1e-5, atol=1e-5)
        decoder.append(torch.tensor([continuation[position] for continuation in CONTINUATIONS]))


@pytest.mark.parametrize(("depth", "trunk"), [(1, "frozen"), (-1, "frozen"), (1, "lora")])
def test_sequences_leave_and_experts_are_chosen(make_family_model, depth, trunk):
    experts = moved(BranchedExperts(make_family_model("Gemma2"), 3, depth, rank=2, trunk=trunk))
    decoder = experts.decoder(*left_padded(PROMPTS), experts=[2, 0])
    decoder.append(torch.tensor([20, 30, 40]))
    decoder.select(torch.tensor([2, 0]))
    decoder.append(torch.tensor([41, 21]))
    found = decoder.logits().log_softmax(-1)
    assert found.shape == (2, 2, 320)
    for row, tokens in enumerate(([12, 13, 14, 40, 41], [5, 6, 7, 8, 9, 10, 20, 21])):
        for column, expert in enumerate((2, 0)):
            expected = full_logits(experts, tokens, expert)
            torch.testing.assert_close(found[row, column], expected, rtol=1e-5, atol=1e-5)


def test_the_trunk_reads_a_token_once(make_family_model):
    experts = moved(BranchedExperts(make_family_model("Llama"), 3, 1, rank=2))
    counts = [0, 0, 0]
    for layer, block in enumerate(experts.base_model.model.layers):
        block.mlp.register_forward_hook(lambda *_, layer=layer: counts.__setitem__(layer, counts[layer] + 1))
    decoder = experts.decoder(*left_padded(PROMPTS))
    decoder.append(torch.tensor([20, 30, 40]))
    assert counts == [2, 2, 6]


def test_prompts_padded_on_the_right_are_refused(make_family_model):
    experts = BranchedExperts(make_family_model("Llama"), 2, 1)
    ids, mask = left_padded(PROMPTS)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        experts.decoder(ids.flip(1), mask.flip(1))
