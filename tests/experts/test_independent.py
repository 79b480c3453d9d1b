"""Independent experts: log-probabilities, references, decoding and placement against the models' own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefmix.experts.base_model import BaseModel
from prefmix.experts.independent import IndependentExperts
from prefmix.experts.interface import PaddedTexts

PROMPT, LENGTHS = 3, (5, 9, 7)


@pytest.fixture
def texts() -> PaddedTexts:
    generator = torch.Generator().manual_seed(0)
    longest = max(LENGTHS)
    input_ids = torch.randint(4, 320, (len(LENGTHS), longest), generator=generator)
    attention = (torch.arange(longest)[None] < torch.tensor(LENGTHS)[:, None]).long()
    completion = attention * (torch.arange(longest)[None] >= PROMPT)
    return PaddedTexts(input_ids * attention, attention, completion)


def _plain(model: Any, texts: PaddedTexts) -> torch.Tensor:
    """Log-probabilities the long way: all logits of the model's own forward."""
    logits = model(input_ids=texts.input_ids, attention_mask=texts.attention_mask).logits.float()
    token = logits[:, :-1].log_softmax(-1).gather(2, texts.input_ids[:, 1:, None])[..., 0]
    return (token * texts.completion_mask[:, 1:]).sum(1)


def _reference(model: Any, name: str) -> BaseModel:
    return BaseModel(model, None, name, name)


@pytest.fixture
def sizes(make_tiny_model: Callable[..., Any]) -> list[Any]:
    """Three models of different sizes over one vocabulary."""
    return [
        make_tiny_model(1),
        make_tiny_model(2, hidden_size=48, num_attention_heads=4, head_dim=12, num_hidden_layers=1),
        make_tiny_model(3, tie_word_embeddings=False),
    ]


def test_log_probs_and_gradients_equal_the_models_own(
    sizes: list[Any], make_tiny_model: Callable[..., Any], texts: PaddedTexts
) -> None:
    base = make_tiny_model()
    experts = IndependentExperts(sizes, base)
    output = experts(texts)
    expected = torch.stack([_plain(model, texts) for model in sizes], dim=1)
    assert torch.allclose(output.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(output.ref_log_probs, _plain(base, texts)[:, None].expand(-1, 3), rtol=1e-5, atol=1e-5)
    assert not output.ref_log_probs.requires_grad
    parameters = [p for model in sizes for p in model.parameters()]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((output.log_probs * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8


def test_each_expert_is_measured_against_its_own_start(
    sizes: list[Any], make_tiny_model: Callable[..., Any], texts: PaddedTexts
) -> None:
    starts = [
        _reference(make_tiny_model(1), "a"),
        None,
        _reference(make_tiny_model(3, tie_word_embeddings=False), "c"),
    ]
    base = make_tiny_model()
    output = IndependentExperts(sizes, base, starts)(texts)
    assert torch.equal(output.log_probs[:, 0].detach(), output.ref_log_probs[:, 0])
    assert torch.allclose(output.ref_log_probs[:, 1], _plain(base, texts), rtol=1e-5, atol=1e-5)
    assert torch.equal(output.log_probs[:, 2].detach(), output.ref_log_probs[:, 2])


def test_equal_references_are_held_and_computed_once(make_tiny_model: Callable[..., Any]) -> None:
    starts = [_reference(make_tiny_model(5), "same"), _reference(make_tiny_model(5), "same")]
    experts = IndependentExperts([make_tiny_model(5), make_tiny_model(5)], make_tiny_model(), starts)
    assert len(experts._own_references) == 1


def test_only_the_experts_train_and_only_they_see_dropout(
    sizes: list[Any], make_tiny_model: Callable[..., Any]
) -> None:
    experts = IndependentExperts(sizes, make_tiny_model(), [_reference(make_tiny_model(1), "a"), None, None]).train()
    assert all(model.training for model in experts.models)
    assert not experts.base_model.training and not experts._own_references[0].training
    trained = {name for name, p in experts.named_parameters() if p.requires_grad}
    assert trained == {f"models.{k}.{name}" for k in range(3) for name, _ in sizes[k].named_parameters()}


def test_a_frozen_expert_gets_no_gradient(
    sizes: list[Any], make_tiny_model: Callable[..., Any], texts: PaddedTexts
) -> None:
    experts = IndependentExperts(sizes, make_tiny_model())
    experts.freeze_experts([1])
    experts(texts).log_probs.sum().backward()
    assert all(p.grad is None for p in sizes[1].parameters())
    assert all(p.grad is not None for p in sizes[0].parameters())


def test_gradient_checkpointing_changes_nothing_but_memory(
    make_tiny_model: Callable[..., Any], texts: PaddedTexts
) -> None:
    gradients, recomputed = [], []
    for checkpointing in (False, True):
        experts = IndependentExperts([make_tiny_model(1)], make_tiny_model()).train()
        if checkpointing:
            experts.activation_checkpointing_enable()
        block = experts.models[0].model.layers[0].mlp
        calls: list[int] = []
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        experts(texts).log_probs.sum().backward()
        gradients.append([p.grad.clone() for p in experts.models[0].parameters()])
        recomputed.append(len(calls))
    assert recomputed == [1, 2]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_decoder_stacks_the_models(sizes: list[Any], make_tiny_model: Callable[..., Any]) -> None:
    experts = IndependentExperts(sizes, make_tiny_model())
    prompts = torch.tensor([[0, 7, 8, 9], [10, 11, 12, 13]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    decoder = experts.decoder(prompts, mask, [2, 0])
    decoder.append(torch.tensor([20, 21]))
    decoder.select(torch.tensor([1]))
    decoder.append(torch.tensor([22]))
    whole = torch.tensor([[10, 11, 12, 13, 21, 22]])
    expected = torch.stack([sizes[k](input_ids=whole).logits[:, -1] for k in (2, 0)], dim=1)
    assert torch.allclose(decoder.logits(), expected, rtol=1e-4, atol=1e-5)


def test_a_placed_expert_stays_where_it_was_put(make_tiny_model: Callable[..., Any], texts: PaddedTexts) -> None:
    experts = IndependentExperts([make_tiny_model(1), make_tiny_model(2)], make_tiny_model(), devices=["cpu", "cpu"])
    torch.nn.ModuleList([experts]).to("meta")
    assert {p.device.type for p in experts.parameters()} == {"cpu"}
    assert torch.isfinite(experts(texts).log_probs).all()


def test_states_go_from_one_instance_to_another(make_tiny_model: Callable[..., Any], texts: PaddedTexts) -> None:
    one = IndependentExperts([make_tiny_model(1), make_tiny_model(2)], make_tiny_model())
    other = IndependentExperts([make_tiny_model(3), make_tiny_model(4)], make_tiny_model())
    for k in range(2):
        other.load_expert_state(k, one.expert_state(k))
    assert torch.equal(one(texts).log_probs, other(texts).log_probs)
    with pytest.raises(ValueError, match="same architecture"):
        one.load_expert_state(0, {"odd": torch.zeros(1)})


def test_another_vocabulary_is_refused(make_tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="vocabulary of 300 tokens, the base has 320"):
        IndependentExperts([make_tiny_model(1, vocab_size=300)], make_tiny_model())


def test_capped_logits_are_the_models_own(texts: PaddedTexts) -> None:
    """Gemma 2 bends its logits after the head, which heads on a shared trunk cannot; whole models can."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    models = [Gemma2ForCausalLM(config).eval(), Gemma2ForCausalLM(config).eval()]
    output = IndependentExperts(models[:1], models[1])(texts)
    assert torch.allclose(output.log_probs[:, 0], _plain(models[0], texts), rtol=1e-5, atol=1e-5)


def test_learners_alone_are_computed_and_computed_right(
    sizes: list[Any], make_tiny_model: Callable[..., Any], texts: PaddedTexts
) -> None:
    experts = IndependentExperts(sizes, make_tiny_model(), [_reference(make_tiny_model(1), "a"), None, None])
    learners = torch.tensor([[True, False, False], [False, False, True], [True, False, False]])
    some, everything = experts.for_learners(texts, learners), experts(texts)
    assert torch.allclose(some.log_probs[learners], everything.log_probs[learners], rtol=1e-5, atol=1e-5)
    some.log_probs.sum().backward()
    assert [any(p.grad is not None for p in model.parameters()) for model in sizes] == [True, False, True]
