"""Texts in one row with shared beginnings have the log-probabilities and gradients of padded rows, with all experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prefmix.data.comparisons import TextTable
from prefmix.experts import text_reader
from prefmix.experts.branches import BranchedExperts
from prefmix.experts.independent import IndependentExperts
from prefmix.experts.interface import AbstractExperts, PaddedTexts
from prefmix.experts.reading import flat_reading, padded_reading, run_reading
from prefmix.experts.text_pass import pad_texts
from prefmix.experts.text_reader import TextReader

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi", "Phi3", "Olmo2", "GPT2"]
# Their windows are shorter than a prompt, so they must not share; the others must.
SLIDING = {"Mistral", "Qwen2", "Gemma2", "Gemma3"}


@pytest.fixture
def texts() -> PaddedTexts:
    """Three answers to one prompt, two to a second that begins as the first does, a single text, one without prompt."""
    common = list(range(40, 54))
    prompts = [common + list(range(60, 75)), common + list(range(80, 93)), list(range(100, 118)), []]
    answers = [[[5, 6, 7], [5, 8], [9]], [[10, 11], [12, 13, 14, 15]], [[16, 17, 18]], [[19, 20, 21]]]
    rows = [(p, c) for p, completions in zip(prompts, answers, strict=True) for c in completions]
    index = np.array([i for i, completions in enumerate(answers) for _ in completions])
    return pad_texts(TextTable([p for p, _ in rows], [c for _, c in rows], index, prompts), np.arange(len(rows)))


def moved(experts: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in experts.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return experts.train()


class Result:
    def __init__(self, experts: AbstractExperts, texts: PaddedTexts, learners: Tensor | None = None) -> None:
        found = experts(texts) if learners is None else experts.for_learners(texts, learners)
        self.log_probs, self.reference = found.log_probs.detach(), found.ref_log_probs
        strength = torch.linspace(0.5, 1.5, found.log_probs.numel()).view_as(found.log_probs).to(found.log_probs)
        strength = strength if learners is None else strength * learners
        trained = [p for p in experts.parameters() if p.requires_grad]
        experts.zero_grad()
        (found.log_probs * strength).sum().backward()
        self.grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]


def both(experts: AbstractExperts, texts: PaddedTexts, learners: Tensor | None = None) -> tuple[Result, Result]:
    results = []
    for sharing in (True, False):
        experts.prefix_sharing = sharing
        results.append(Result(experts, texts, learners))
    return results[0], results[1]


def check(shared: Result, padded: Result, tolerance: float = 1e-4, learners: Tensor | None = None) -> None:
    read = slice(None) if learners is None else learners
    torch.testing.assert_close(shared.log_probs[read], padded.log_probs[read], rtol=tolerance / 10, atol=tolerance)
    torch.testing.assert_close(shared.reference, padded.reference, rtol=tolerance / 10, atol=tolerance)
    assert max(float(g.abs().max()) for g in padded.grads) > 0
    for found, expected in zip(shared.grads, padded.grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def tokens_read(model: Any, run: Callable[[], Any]) -> int:
    """Tokens that pass through the first block."""
    counts = []
    block = next(part for part in model.get_decoder().children() if isinstance(part, nn.ModuleList))[0]
    handle = block.register_forward_hook(lambda module, args, output: counts.append(args[0].shape[:2].numel()))
    run()
    handle.remove()
    return sum(counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_share_or_fall_back(make_family_model: Any, texts: PaddedTexts, family: str) -> None:
    model = make_family_model(family)
    reader = TextReader(model)
    assert reader.shares == (family not in SLIDING)
    reading = reader.read(texts)
    expected = run_reading(model, padded_reading(texts))
    found = run_reading(model, reading)
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-4, atol=1e-5)
    for name in ("targets", "segments", "num_texts"):
        assert torch.equal(torch.as_tensor(getattr(found, name)), torch.as_tensor(getattr(expected, name)))


@pytest.mark.parametrize("family", sorted(SLIDING))
def test_a_window_that_no_text_exceeds_is_no_obstacle(make_family_model: Any, texts: PaddedTexts, family: str) -> None:
    model = make_family_model(family)
    longest = texts.input_ids.shape[1]
    config = model.get_decoder().config
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = longest
    config.sliding_window = longest
    reader = TextReader(model)
    assert reader.shares and reader.read(texts).spans is not None
    found, expected = (run_reading(model, read(texts)).hidden for read in (flat_reading, padded_reading))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    config.sliding_window = longest - 1
    assert TextReader(model).read(texts).spans is None


@pytest.mark.parametrize("depth", [1, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_branches(make_family_model: Any, texts: PaddedTexts, family: str, depth: int) -> None:
    check(*both(moved(BranchedExperts(make_family_model(family), 2, depth, rank=2)), texts))


@pytest.mark.parametrize(
    ("depth", "head", "trunk"),
    [(1, "hidden", "frozen"), (2, "none", "lora"), (1, "logit", "full"), (0, "hidden", "lora"), (0, "full", "full")],
)
def test_heads_and_trained_trunks_in_float64(
    make_tiny_model: Any, texts: PaddedTexts, depth: int, head: str, trunk: str
) -> None:
    model = make_tiny_model(num_hidden_layers=3)
    experts = moved(BranchedExperts(model, 2, depth, head=head, rank=2, trunk=trunk)).double()
    # The model computes its norms and rotary tables in float32.
    check(*both(experts, texts), tolerance=1e-6)


@pytest.mark.parametrize("depth", [1, -1])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Phi", "GPT2"])
@pytest.mark.parametrize("looked", [False, True], ids=["alone", "after a look"])
def test_the_second_look_of_a_cheap_m_step(
    make_family_model: Any, texts: PaddedTexts, family: str, depth: int, looked: bool
) -> None:
    learners = torch.zeros(len(texts.input_ids), 3, dtype=torch.bool)
    learners[[1, 4], 0] = learners[[2, 5, 6], 1] = True  # expert 2 learns nothing
    experts = moved(BranchedExperts(make_family_model(family), 3, depth, rank=2))
    results = []
    for sharing in (True, False):
        experts.prefix_sharing = sharing
        if looked:
            with torch.no_grad():
                experts(texts)
        results.append(Result(experts, texts, learners))
    check(*results, learners=learners)
    assert not results[0].log_probs[~learners].any()


def test_recomputed_branches(make_tiny_model: Any, texts: PaddedTexts) -> None:
    experts = moved(BranchedExperts(make_tiny_model(num_hidden_layers=3), 2, 1, rank=2))
    plain, _ = both(experts, texts)
    experts.activation_checkpointing_enable()
    again, _ = both(experts, texts)
    assert all(torch.equal(a, b) for a, b in zip(plain.grads, again.grads, strict=True))


@pytest.mark.parametrize("checkpointing", [None, {}, {"use_reentrant": True}])
def test_independent_experts(
    make_tiny_model: Any, make_family_model: Any, texts: PaddedTexts, checkpointing: dict[str, Any] | None
) -> None:
    base = make_family_model("Llama")
    models = [copy.deepcopy(base), make_family_model("Mistral", seed=1), make_family_model("GPT2", seed=2)]
    experts = IndependentExperts(models, base).train()
    for model in models[2:]:
        model.eval()  # GPT-2's dropout would make two passes differ
    expected = both(experts, texts)[1]
    experts.prefix_sharing = True
    if checkpointing is not None:
        models[0].train()
        experts.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
        assert experts.prefix_sharing != bool(checkpointing.get("use_reentrant"))
    check(Result(experts, texts), expected)
    learners = torch.zeros(len(texts.input_ids), 3, dtype=torch.bool)
    learners[[0, 2], 0] = learners[[1, 3], 1] = True
    check(*both(experts, texts, learners), learners=learners)


def test_a_shared_prompt_is_read_once(make_tiny_model: Any, texts: PaddedTexts) -> None:
    model = make_tiny_model()
    experts = BranchedExperts(model, 1, -1)
    with torch.no_grad():
        # Reference and expert; 14 common tokens, two prompts below them, and what is each text's own.
        each = 14 + 15 + 3 + 2 + 1 + 13 + 2 + 4 + 18 + 3 + 3
        assert tokens_read(model, lambda: experts(texts)) == 2 * each
        experts.prefix_sharing = False
        assert tokens_read(model, lambda: experts(texts)) == 2 * texts.input_ids.numel()


def test_dropped_tokens_stay_context(make_tiny_model: Any, texts: PaddedTexts) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = texts.completion_mask * (torch.rand(texts.completion_mask.shape, generator=generator) < 0.5)
    check(*both(moved(BranchedExperts(make_tiny_model(), 2, 1, rank=2)), texts._replace(completion_mask=kept)))


def test_equal_texts_and_beginnings_of_others(make_tiny_model: Any) -> None:
    ids = list(range(30, 50))
    rows = [ids, ids, ids[:15], ids[:15] + [7]]
    table = TextTable([row[:3] for row in rows], [row[3:] for row in rows], np.zeros(4, dtype=np.int64), [ids[:3]])
    check(*both(moved(BranchedExperts(make_tiny_model(), 2, 1, rank=2)), pad_texts(table, np.arange(4))))


def test_eager_attention_shares_and_flash_does_not(make_tiny_model: Any, texts: PaddedTexts) -> None:
    model = make_tiny_model()
    model.set_attn_implementation("eager")
    assert TextReader(model).shares
    found, expected = (run_reading(model, read(texts)).hidden for read in (flat_reading, padded_reading))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "eager"
    model.config._attn_implementation_internal = "flash_attention_2"
    assert not TextReader(model).shares


def test_a_model_whose_states_differ_falls_back(make_tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model()
    original = text_reader.run_reading
    monkeypatch.setattr(
        text_reader,
        "run_reading",
        lambda m, r: original(m, r if r.spans is None else r._replace(position_ids=r.position_ids + 1)),
    )
    assert TextReader(model).shares  # rotary positions are relative
    monkeypatch.setattr(
        text_reader,
        "run_reading",
        lambda m, r: original(m, r if r.spans is None else r._replace(position_ids=r.position_ids * 2)),
    )
    assert not TextReader(model).shares


def test_the_model_is_left_as_it_was_after_an_error(make_tiny_model: Any, texts: PaddedTexts) -> None:
    model = make_tiny_model()
    before = model.config._attn_implementation
    with pytest.raises(IndexError):
        run_reading(model, flat_reading(texts)._replace(input_ids=torch.full((1, 78), 10**6)))
    assert model.config._attn_implementation == before
    run_reading(model, flat_reading(texts))
