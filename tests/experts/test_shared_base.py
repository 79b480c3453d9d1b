"""Experts on a shared base against the base model itself and against experts that are materialised."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from prefmix.experts.build import build_experts
from prefmix.experts.interface import PackedStates
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.experts.text_pass import pad_texts
from prefmix.experts.trunk_cache import build_trunk_states

HEADS = ["hidden", "logit", "full"]


def moved(experts: SharedBaseExperts, scale: float = 0.3) -> SharedBaseExperts:
    """Experts that have left their start, each in its own direction."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in experts.head.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return experts


def materialised(experts: SharedBaseExperts, input_ids: torch.Tensor) -> torch.Tensor:
    """Float64 next-token log-probabilities [K, L, V] of one text, from the definition of each head."""
    model = experts.base_model
    states = model.get_decoder()(input_ids[None]).last_hidden_state[0].double()
    weight = model.get_output_embeddings().weight.double()
    logits = []
    for k in range(experts.num_experts):
        state = {name: x.double() for name, x in experts.expert_state(k).items()}
        if experts.head_kind == "hidden":
            logits.append((states + states @ state["down"].T @ state["up"].T) @ weight.T)
        elif experts.head_kind == "logit":
            logits.append(states @ weight.T + states @ state["down"].T @ state["up"].T)
        else:
            logits.append(states @ state["weight"].T)
    return torch.stack(logits).log_softmax(-1)


@pytest.mark.parametrize("head", HEADS)
def test_log_probs_equal_the_definition(tiny_model, make_texts, head):
    texts = make_texts()
    experts = moved(SharedBaseExperts(tiny_model, 3, head=head, rank=4))
    found = experts(pad_texts(texts, range(5))).log_probs
    for i, (prompt, completion) in enumerate(zip(texts.prompt_ids, texts.completion_ids)):
        ids = torch.tensor(prompt + completion)
        rows = materialised(experts, ids)[:, len(prompt) - 1 : -1]
        expected = rows.gather(-1, torch.tensor(completion)[None, :, None].expand(3, -1, 1)).sum((1, 2))
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_at_the_start_every_expert_is_the_reference_exactly(tiny_model, make_texts, head):
    result = SharedBaseExperts(tiny_model, 3, head=head)(pad_texts(make_texts(), range(5)))
    assert result.log_probs.dtype == torch.float32
    assert torch.equal(result.log_probs, result.ref_log_probs)
    assert not result.ref_log_probs.requires_grad


@pytest.mark.parametrize("head", HEADS)
def test_a_bfloat16_base_keeps_float32_heads_and_the_exact_start(make_tiny_model, make_texts, head):
    experts = SharedBaseExperts(make_tiny_model().bfloat16(), 2, head=head)
    result = experts(pad_texts(make_texts(), range(5)))
    assert {p.dtype for p in experts.head.parameters()} == {torch.float32}
    assert torch.equal(result.log_probs, result.ref_log_probs)
    result = moved(experts, 0.01)(pad_texts(make_texts(), range(5)))
    (result.log_probs.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in experts.head.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_cached_states_give_what_token_ids_give(base, make_texts, tmp_path, head):
    texts = make_texts()
    experts = moved(SharedBaseExperts(base.model, 2, head=head))
    states = build_trunk_states(base, texts, cache_dir=tmp_path, progress=False)
    ids = [3, 0, 4]
    cached = experts(PackedStates(**states.gather(ids), num_texts=3))
    direct = experts(pad_texts(texts, ids))
    torch.testing.assert_close(cached.log_probs, direct.log_probs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cached.ref_log_probs, direct.ref_log_probs, rtol=1e-5, atol=1e-4)


def test_cached_states_skip_the_trunk(base, make_texts, tmp_path, monkeypatch):
    experts = SharedBaseExperts(base.model, 2)
    states = build_trunk_states(base, make_texts(), cache_dir=tmp_path, progress=False)
    monkeypatch.setattr(base.model.model, "forward", None)
    experts(PackedStates(**states.gather([0, 1]), num_texts=2))


def test_only_heads_train_and_the_trunk_stays_in_evaluation_mode(make_tiny_model, make_texts):
    experts = SharedBaseExperts(make_tiny_model(attention_dropout=0.5), 2)
    assert {name for name, p in experts.named_parameters() if p.requires_grad} == {"head.down", "head.up"}
    experts.train()
    assert experts.training and experts.head.training and not experts.base_model.training
    texts = pad_texts(make_texts(), range(5))
    assert torch.equal(experts(texts).ref_log_probs, experts(texts).ref_log_probs)
    experts(texts).log_probs.sum().backward()
    assert all(p.grad is None for p in experts.base_model.parameters())


def test_experts_differ_in_their_random_part_and_follow_the_seed(make_tiny_model):
    down = [
        SharedBaseExperts(make_tiny_model(), 3, generator=torch.Generator().manual_seed(seed)).head.down
        for seed in (0, 0, 1)
    ]
    assert torch.equal(down[0], down[1])
    assert not torch.equal(down[0], down[2])
    assert not torch.allclose(down[0][0], down[0][1])


@pytest.mark.parametrize("head", HEADS)
def test_expert_state_and_description_rebuild_an_expert(make_tiny_model, make_texts, head):
    experts = moved(SharedBaseExperts(make_tiny_model(), 2, head=head, rank=3))
    description = json.loads(json.dumps(experts.describe()))
    rebuilt = build_experts(make_tiny_model(), description)
    for k in range(2):
        state = experts.expert_state(k)
        assert all("base" not in name and not x.requires_grad for name, x in state.items())
        rebuilt.load_expert_state(k, state)
    texts = pad_texts(make_texts(), range(5))
    assert torch.equal(experts(texts).log_probs, rebuilt(texts).log_probs)


def test_a_state_of_another_head_is_refused(make_tiny_model):
    hidden, logit = SharedBaseExperts(make_tiny_model(), 2), SharedBaseExperts(make_tiny_model(), 2, head="logit")
    with pytest.raises(ValueError, match="expert 1"):
        hidden.load_expert_state(1, logit.expert_state(1))


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"head": "lora"}, "head='lora'"), ({"num_experts": 0}, "num_experts=0"), ({"rank": 0}, "expert_rank=0")],
)
def test_wrong_choices_are_named(tiny_model, fields, match):
    with pytest.raises(ValueError, match=match):
        SharedBaseExperts(tiny_model, **({"num_experts": 2} | fields))


@pytest.mark.parametrize("description", [{"kind": "whole_models"}, {"kind": "shared_base", "branch_depth": 4}])
def test_unknown_kinds_of_experts_are_named(tiny_model, description):
    with pytest.raises(ValueError, match="whole_models|branch_depth=4"):
        build_experts(tiny_model, description)


SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
OTHER_FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4)),
    "phi (bias)": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
    "cohere (logit_scale)": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "granite (logits_scaling)": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_reference_equals_the_model_of_other_families(make_texts, family):
    torch.manual_seed(0)
    model = OTHER_FAMILIES[family]().eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    texts = make_texts()
    found = SharedBaseExperts(model, 2)(pad_texts(texts, range(5)))
    for i, (prompt, completion) in enumerate(zip(texts.prompt_ids, texts.completion_ids)):
        with torch.no_grad():
            rows = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = rows.gather(1, torch.tensor(completion)[:, None]).sum()
        torch.testing.assert_close(found.ref_log_probs[i, 0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.log_probs, found.ref_log_probs)


def test_softcapped_logits_are_refused_by_name():
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0))
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0"):
        SharedBaseExperts(model, 2)


def test_a_model_with_another_way_to_its_logits_is_refused(tiny_model):
    class Louder(type(tiny_model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    tiny_model.__class__ = Louder
    with pytest.raises(ValueError, match="logits are not its output head"):
        SharedBaseExperts(tiny_model, 2)


@pytest.mark.parametrize("head", ["hidden", "logit"])
def test_every_implementation_gives_the_same_heads(tiny_model, make_texts, monkeypatch, head):
    """Values and gradients of what trains, by the kernel that the environment names."""
    texts, found = pad_texts(make_texts(), range(5)), {}
    experts = moved(SharedBaseExperts(tiny_model, 3, head=head, rank=4))
    for name in ("eager", "chunked", "auto"):
        monkeypatch.setenv("PREFMIX_KERNEL", name)
        experts.zero_grad()
        log_probs = experts(texts).log_probs
        (log_probs * torch.arange(log_probs.numel()).view_as(log_probs).sin()).sum().backward()
        found[name] = [log_probs.detach(), *(p.grad.clone() for p in experts.head.parameters())]
    for name in ("chunked", "auto"):
        for one, other in zip(found[name], found["eager"], strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-5, name
