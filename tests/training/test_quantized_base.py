"""Experts on a base with 8- and 4-bit weights: start, training, saved policies, and what is refused."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmix.experts.base_model import load_base
from prefmix.experts.branches import BranchedExperts
from prefmix.experts.quantization import quantization_of, quantization_options
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.experts.text_pass import pad_texts
from prefmix.policy.export import merged_model
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.config import MixtureConfig
from prefmix.training.options import validate_options
from prefmix.training.trainer import MixtureTrainer

BITS = ["8bit", "4bit"]


def _works_here() -> bool:
    """Whether bitsandbytes is installed and multiplies on this machine's CPU."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes

    try:
        layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
        return bool(layer(torch.ones(1, 64)).isfinite().all())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


needs_bitsandbytes = pytest.mark.skipif(
    not _works_here(), reason="bitsandbytes is not installed, or has no CPU kernels (pip install 'prefmix[quantized]')"
)


@pytest.fixture
def folder(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint of the tiny model."""
    make_tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def config(folder: Path, **fields: Any) -> MixtureConfig:
    defaults: dict[str, Any] = {
        "num_experts": 2,
        "expert_rank": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "init": "random",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "cache_dir": str(folder / "cache"),
    }
    return MixtureConfig(str(folder / "run"), **(defaults | fields))


def packed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Quantised weights and their scales."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "layers." in name}


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"branch_depth": 1, "head": "hidden"},
        {"branch_depth": -1, "gradient_checkpointing": True},
        {"trunk": "lora"},
    ],
    ids=["heads", "last block", "all blocks", "trained trunk"],
)
def test_trains_saves_and_is_found_again(folder, rows, tmp_path, bits, fields):
    # One expert: with several the bound holds the divergence of the first responsibilities beside log 2.
    args = config(folder, num_experts=1, **{f"load_in_{bits}": True}, **fields)
    trainer = MixtureTrainer(str(folder), args, train_dataset=rows)
    base = trainer.mixture.experts.base_model
    assert quantization_of(base) == bits
    before = packed(base)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(map(math.isfinite, losses)) and losses[-1] != losses[0]
    after = packed(base)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    policy = MixturePolicy.from_pretrained(tmp_path / "base" / "run", device="cpu")
    assert policy.config.quantization == bits and quantization_of(policy.model.experts.base_model) == bits
    assert policy.config.base_sha256 == trainer.base.sha256
    texts = pad_texts(trainer.train_comparisons.table.texts, range(4))
    with torch.no_grad():
        found, expected = policy.model.experts(texts), trainer.mixture.eval().experts(texts)
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    with pytest.raises(ValueError, match=f"{bits} weights"):
        merged_model(policy.model.experts, 0)


@needs_bitsandbytes
def test_a_quantised_base_is_another_base_but_the_same_on_every_load(folder):
    shas = {bits: load_base(folder, dtype=torch.float32, quantization=bits).sha256 for bits in (None, *BITS)}
    assert len(set(shas.values())) == 3  # states of one are never taken for another's
    assert load_base(folder, dtype=torch.float32, quantization="4bit").sha256 == shas["4bit"]
    loaded = load_base(folder, dtype=torch.float32, quantization="4bit").model
    assert load_base(loaded).sha256 == shas["4bit"]
    assert loaded.get_output_embeddings().weight.dtype == torch.float32


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_updates_on_quantised_layers_are_those_on_their_values(folder, rows, bits):
    """Against the same experts on a base of ordinary layers that hold the dequantised weights."""
    quantised = load_base(folder, dtype=torch.float32, quantization=bits)
    plain = load_base(folder, dtype=torch.float32).model
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear) and "layers." in name:
            eye = torch.eye(layer.in_features)
            with torch.no_grad():
                layer.weight.copy_(quantised.model.get_submodule(name)(eye).T)
    trainer = MixtureTrainer(str(folder), config(folder), train_dataset=rows)
    texts = pad_texts(trainer.train_comparisons.table.texts, range(4))
    found = []
    for model in (quantised.model, plain):
        experts = BranchedExperts(model, 2, branch_depth=1, head="hidden", rank=2)
        generator = torch.Generator().manual_seed(1)
        for parameter in experts.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        log_probs = experts(texts).log_probs
        grads = torch.autograd.grad(log_probs.sum(), [p for p in experts.parameters() if p.requires_grad])
        found.append([log_probs.detach(), *grads])
    for mine, theirs in zip(*found, strict=True):
        # Activations are rounded to 8 bits on the way into an 8-bit layer, so only the weights are equal there.
        limit = 1e-4 if bits == "4bit" else 0.1
        assert float((mine - theirs).norm() / theirs.norm()) < limit


def test_says_what_is_missing(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bitsandbytes is not installed; run `pip install 'prefmix\[quantized\]'`"):
        load_base(folder, quantization="4bit")


def test_a_model_object_cannot_be_quantised_afterwards(folder, rows, make_tiny_model, tiny_tokenizer):
    args = config(folder, load_in_4bit=True)
    with pytest.raises(ValueError, match="give its folder or hub name"):
        MixtureTrainer(make_tiny_model(), args, train_dataset=rows, processing_class=tiny_tokenizer)


@needs_bitsandbytes
def test_a_model_object_that_is_quantised_already_trains(folder, rows):
    loaded = load_base(folder, dtype=torch.float32, quantization="4bit")
    args = config(folder, load_in_4bit=True, num_experts=1)
    trainer = MixtureTrainer(loaded.model, args, train_dataset=rows, processing_class=loaded.tokenizer)
    trainer.train()
    assert trainer.base.sha256 == loaded.sha256


def test_gguf_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="GGUF"):
        quantization_options("model.gguf", "8bit", None)
    with pytest.raises(ValueError, match="quantization='3bit'"):
        quantization_options("model", "3bit", None)


def test_a_device_without_kernels_is_named(folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr("prefmix.experts.base_model.quantization_options", lambda *args: {})
    with pytest.raises(ValueError, match="load_in_8bit=true does not work here: no kernel"):
        load_base(folder, quantization="8bit")


def test_a_head_that_was_quantised_is_refused(make_tiny_model):
    model = make_tiny_model(tie_word_embeddings=False)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="int8 weights"):
        SharedBaseExperts(model, 2)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "choose one"),
        ({"load_in_4bit": True, "trunk": "full"}, "use trunk='lora'"),
        ({"load_in_4bit": True, "expert_kind": "independent"}, "quantised weights cannot"),
        ({"load_in_8bit": True, "sharding": "fsdp2"}, "sharding='none'"),
    ],
)
def test_combinations_that_cannot_work_are_refused(options, part):
    with pytest.raises(ValueError, match=part):
        validate_options(options)
