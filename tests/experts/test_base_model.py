"""Loading a base model, and what its fingerprint depends on."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from prefmix.experts.base_model import content_sha256, load_base, without_quantization_marks


@pytest.fixture
def folder(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_folder_gives_model_tokenizer_source_and_hash(folder, tiny_model, tiny_tokenizer):
    base = load_base(folder)
    assert base.source == str(folder)
    assert not base.model.training
    assert base.tokenizer("The sky")["input_ids"] == tiny_tokenizer("The sky")["input_ids"]
    assert base.sha256 == load_base(str(folder)).sha256 == content_sha256(tiny_model)


def test_the_hash_sees_weights_config_and_type(make_tiny_model, folder):
    hashes = [content_sha256(make_tiny_model()), content_sha256(make_tiny_model(rms_norm_eps=1e-4))]
    changed = make_tiny_model()
    changed.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-6
    hashes.append(content_sha256(changed))
    hashes.append(load_base(folder, dtype=torch.bfloat16).sha256)
    assert len(set(hashes)) == 4


def test_the_hash_does_not_see_where_the_model_was(make_tiny_model, tmp_path):
    hashes = set()
    for name in ("a", "b"):
        make_tiny_model().save_pretrained(tmp_path / name)
        hashes.add(content_sha256(LlamaForCausalLM.from_pretrained(tmp_path / name)))
    moved = make_tiny_model()
    moved.requires_grad_(False)
    assert hashes == {content_sha256(moved)}


def test_a_model_object_is_taken_as_it_is(tiny_model, folder):
    base = load_base(tiny_model)
    assert base.model is tiny_model
    assert base.tokenizer is None
    assert base.source.startswith("<")
    named = load_base(LlamaForCausalLM.from_pretrained(folder))
    assert named.source == str(folder)
    assert named.tokenizer is not None


@pytest.mark.parametrize("source", ["/no/such/folder", "./no_such_folder"])
def test_a_missing_folder_is_named(source):
    with pytest.raises(ValueError, match=r"no.such.folder: no such file"):
        load_base(source)


def test_a_hub_name_offline_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("prefmix.experts.base_model.hub_answers", lambda _: False)
    with pytest.raises(ValueError, match="base model nobody/nothing") as error:
        load_base("nobody/nothing")
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"base model {tmp_path}"):
        load_base(tmp_path)


def test_quantization_marks_are_cleared_and_nothing_else(tiny_model, tmp_path):
    ids = torch.tensor([[5, 6, 7]])
    expected = tiny_model(ids).logits
    # What transformers leaves on a model that it read from GGUF.
    tiny_model.config.quantization_config = {"quant_method": "gguf"}
    tiny_model.is_quantized, tiny_model.hf_quantizer = True, None
    clean = without_quantization_marks(tiny_model)
    assert not hasattr(clean.config, "quantization_config")
    assert clean.get_output_embeddings().weight is clean.get_input_embeddings().weight
    assert torch.equal(clean(ids).logits, expected)
    clean.save_pretrained(tmp_path / "clean")
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "clean")(ids).logits, expected)
