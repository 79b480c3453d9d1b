"""Policies of independent experts on disk: whole models, with the references that they were measured against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefmix.experts.base_model import load_base
from prefmix.experts.independent import IndependentExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy

PROMPT, RESPONSES = "Where is the sun?", ["In the sky.", "In the sea."]


@pytest.fixture
def make_independent(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> Callable[..., MixturePolicy]:
    """Two experts of different sizes; the second has a reference of its own, found on disk or only in memory."""

    def build(stored_reference: bool = True) -> MixturePolicy:
        for name, seed in (("base", 0), ("start", 5)):
            make_tiny_model(seed, num_hidden_layers=1).save_pretrained(tmp_path / name)
            tiny_tokenizer.save_pretrained(tmp_path / name)
        base = load_base(tmp_path / "base", dtype=torch.float32)
        start = load_base(tmp_path / "start", dtype=torch.float32)
        start = start if stored_reference else start._replace(source="<object>")
        experts = IndependentExperts(
            [make_tiny_model(1), make_tiny_model(2, hidden_size=16)], base.model, [None, start]
        )
        config = PolicyConfig((0.1, 0.2), "user", base.source, base.sha256, max_length=64)
        return MixturePolicy(MixtureModel(experts, Gate(2, ("global",))), tiny_tokenizer, config)

    return build


@pytest.mark.parametrize("stored_reference", [True, False])
def test_round_trip(make_independent: Callable[..., MixturePolicy], tmp_path: Path, stored_reference: bool) -> None:
    policy = make_independent(stored_reference)
    rows = [{"prompt": PROMPT, "chosen": " " + RESPONSES[0], "rejected": " " + RESPONSES[1]}]
    policy.save_pretrained(tmp_path / "policy")
    loaded = MixturePolicy.from_pretrained(tmp_path / "policy", device="cpu")
    loaded.save_pretrained(tmp_path / "again")
    again = MixturePolicy.from_pretrained(tmp_path / "again", device="cpu")
    for other in (loaded, again):
        assert torch.equal(other.log_prob(PROMPT, RESPONSES), policy.log_prob(PROMPT, RESPONSES))
        assert other.score(rows) == policy.score(rows)  # rewards, so the references too
    assert (tmp_path / "again" / "reference_0").is_dir() is not stored_reference
    for decoder in ("sample", "mixture", "top"):
        assert isinstance(loaded.generate(PROMPT, decoder=decoder, max_new_tokens=3, seed=0), str)


def test_an_expert_alone_is_an_ordinary_model(make_independent: Callable[..., MixturePolicy], tmp_path: Path) -> None:
    policy = make_independent()
    policy.save_pretrained(tmp_path / "policy")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "policy" / "expert_1")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "policy" / "expert_1")(PROMPT, return_tensors="pt")
    logits = policy.model.experts.decoder(tokens.input_ids, tokens.attention_mask, [1]).logits()[:, 0]
    assert torch.allclose(alone(**tokens).logits[:, -1], logits, atol=1e-5)


def test_another_reference_is_refused(
    make_independent: Callable[..., MixturePolicy], make_tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_independent().save_pretrained(tmp_path / "policy")
    make_tiny_model(6, num_hidden_layers=1).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="the expert was measured against"):
        MixturePolicy.from_pretrained(tmp_path / "policy", device="cpu")
