"""Every branched expert is a PEFT adapter: PEFT alone loads the folder and gives the expert's log-probabilities."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from prefmix.experts.branches import BranchedExperts
from prefmix.experts.text_pass import pad_texts
from prefmix.policy.adapters import write_adapter


def moved(experts: BranchedExperts) -> BranchedExperts:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in experts.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return experts


@torch.no_grad()
def token_sum(model, texts) -> torch.Tensor:
    sums = []
    for prompt, completion in zip(texts.prompt_ids, texts.completion_ids):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.double().log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(sums)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("family", "depth", "head", "trunk"),
    [
        ("Llama", 1, "none", "frozen"),
        ("Llama", 2, "hidden", "frozen"),
        ("Llama", 1, "logit", "lora"),
        ("Llama", 0, "hidden", "lora"),
        ("Llama", -1, "none", "frozen"),
        ("Gemma2", 2, "hidden", "frozen"),
        ("Phi3", 1, "none", "lora"),
        ("Qwen2", -1, "logit", "frozen"),
        ("GPT2", 1, "none", "frozen"),
        ("GPT2", -1, "hidden", "frozen"),
    ],
)
def test_peft_alone_loads_an_expert(make_family_model, make_texts, tmp_path, family, depth, head, trunk):
    texts = make_texts()
    model = make_family_model(family)
    experts = moved(BranchedExperts(model, 2, depth, head=head, rank=2, lora_alpha=6, trunk=trunk))
    expected = experts(pad_texts(texts, range(5))).log_probs
    assert (expected[:, 1] - token_sum(model, texts)).abs().max() > 0.05
    assert write_adapter(experts, 1, tmp_path, "somewhere/base")
    alone = PeftModel.from_pretrained(make_family_model(family), str(tmp_path)).eval()
    torch.testing.assert_close(token_sum(alone, texts), expected[:, 1].double(), rtol=1e-5, atol=2e-5)
    saved = {name for name in alone.state_dict() if "lora_" in name}
    assert len(saved) == len(experts.expert_state(1)) + len(experts.shared_state())  # nothing was left untouched


def test_the_config_names_layers_as_peft_does(make_tiny_model, tmp_path):
    experts = BranchedExperts(make_tiny_model(num_hidden_layers=3), 2, 2, rank=4)
    write_adapter(experts, 0, tmp_path, "somewhere/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1, 2]
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, "somewhere/base")


@pytest.mark.parametrize(("depth", "head", "trunk"), [(1, "none", "full"), (0, "full", "lora")])
def test_whole_weights_are_no_adapter(make_tiny_model, tmp_path, depth, head, trunk):
    experts = BranchedExperts(make_tiny_model(), 2, depth, head=head, trunk=trunk)
    assert not write_adapter(experts, 0, tmp_path, "somewhere/base")
    assert not list(tmp_path.iterdir())
