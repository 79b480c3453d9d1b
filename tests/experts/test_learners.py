"""The second look of a cheap M-step: right where an expert learns, and no work anywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefmix.experts.branches import BranchedExperts
from prefmix.experts.text_pass import pad_texts

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi", "Phi3", "Olmo2", "GPT2"]
# [4 texts, 3 experts]: a text for nobody, an expert for nothing, a text for two.
LEARNERS = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]]).bool()


def moved(experts: BranchedExperts) -> BranchedExperts:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in experts.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return experts.train()


def gradients(experts: nn.Module, log_probs: Tensor) -> list[Tensor]:
    strength = torch.linspace(0.5, 1.5, log_probs.numel()).view_as(log_probs) * LEARNERS
    trained = [p for p in experts.parameters() if p.requires_grad]
    found = torch.autograd.grad((log_probs * strength).sum(), trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found)]


@pytest.mark.parametrize("looked", [False, True], ids=["alone", "after a look"])
@pytest.mark.parametrize("depth", [1, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_look_equals_the_whole_pass(
    make_family_model: Any, make_texts: Any, family: str, depth: int, looked: bool
) -> None:
    experts = moved(BranchedExperts(make_family_model(family), 3, depth, rank=2))
    check(experts, pad_texts(make_texts(), range(4)), looked)


@pytest.mark.parametrize(
    ("depth", "head", "trunk"),
    [(1, "hidden", "frozen"), (2, "none", "lora"), (1, "logit", "full"), (0, "hidden", "lora")],
)
def test_heads_and_trained_trunks_too(make_tiny_model: Any, make_texts: Any, depth: int, head: str, trunk: str) -> None:
    model = make_tiny_model(num_hidden_layers=3)
    experts = moved(BranchedExperts(model, 3, depth, head=head, rank=2, trunk=trunk))
    check(experts, pad_texts(make_texts(), range(4)), looked=True)


def check(experts: BranchedExperts, texts: Any, looked: bool) -> None:
    whole = experts(texts).log_probs
    expected = gradients(experts, whole)
    if looked:
        with torch.no_grad():
            experts(texts)
    found = experts.for_learners(texts, LEARNERS).log_probs
    torch.testing.assert_close(found[LEARNERS], whole[LEARNERS], rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(gradients(experts, found), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    assert max(float(g.abs().max()) for g in expected) > 0


def blocks_run(experts: BranchedExperts, run: Any) -> list[int]:
    """Tokens that each of the base's blocks reads, added up over calls."""
    counts = [0] * len(experts.base_model.model.layers)

    def hook(index: int) -> Any:
        def count(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            counts[index] += (output[0] if isinstance(output, tuple) else output).shape[:2].numel()

        return count

    handles = [layer.mlp.register_forward_hook(hook(i)) for i, layer in enumerate(experts.base_model.model.layers)]
    run()
    for handle in handles:
        handle.remove()
    return counts


def test_nothing_else_is_read(make_tiny_model: Any, make_texts: Any) -> None:
    texts = pad_texts(make_texts(), range(4))
    lengths = texts.attention_mask.sum(1)
    every, learned = int(lengths.sum()), int(LEARNERS.sum(1) @ lengths)
    experts = moved(BranchedExperts(make_tiny_model(num_hidden_layers=3), 3, 1, rank=2))
    with torch.no_grad():
        # The reference, and each expert.
        assert blocks_run(experts, lambda: experts(texts)) == [every, every, every + 3 * every]
    # After a look the trunk's states are there; the experts' own block reads the two and two texts of its learners.
    assert blocks_run(experts, lambda: experts.for_learners(texts, LEARNERS)) == [0, 0, learned]
    # They were there for one visit, and for these texts.
    assert blocks_run(experts, lambda: experts.for_learners(texts, LEARNERS))[:2] == [every, every]
