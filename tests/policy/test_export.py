"""Exports compute what the policy computes: as an adapter, as a whole model, as a folder for servers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefmix.experts.branches import BranchedExperts
from prefmix.experts.independent import IndependentExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.config import PolicyConfig
from prefmix.policy.export import export_adapter, export_merged
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.server_export import export_servers

PROMPT, RESPONSES = "Where is the sun?", ["In the sky.", "In the sea.", "No, it is not."]


def log_probs_of(model: Any, policy: MixturePolicy) -> torch.Tensor:
    """Log-probabilities of the responses by the model's own forward."""
    tokenizer, values = policy.tokenizer, []
    prompt = tokenizer(PROMPT).input_ids
    for response in RESPONSES:
        ids = torch.tensor([[*prompt, *tokenizer(response).input_ids, tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        values.append(logits.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())
    return torch.stack(values).detach()


def ours(policy: MixturePolicy, expert: int) -> torch.Tensor:
    return policy.log_prob(PROMPT, RESPONSES, per_expert=True)[:, expert]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["hidden", "logit", "full"])
def test_a_merged_expert_is_that_expert(
    make_policy: Callable[..., MixturePolicy], make_tiny_model: Any, tmp_path: Path, head: str, tied: bool
) -> None:
    policy = make_policy(head=head, model=make_tiny_model(tie_word_embeddings=tied))
    base = policy.model.experts.base_model
    before = base.get_output_embeddings().weight.clone()
    export_merged(policy, 1, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(log_probs_of(merged, policy), ours(policy, 1), atol=1e-4)
    # The input embeddings stay the base's, in the file and in memory.
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight
    assert torch.equal(base.get_output_embeddings().weight, before)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(PROMPT).input_ids == policy.tokenizer(PROMPT).input_ids


@pytest.mark.parametrize("head", ["hidden", "logit"])
def test_an_adapter_is_that_expert(
    make_policy: Callable[..., MixturePolicy], make_tiny_model: Any, tmp_path: Path, head: str
) -> None:
    policy = make_policy(head=head)
    export_adapter(policy, 2, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_tiny_model(), tmp_path / "adapter")
    assert torch.allclose(log_probs_of(loaded, policy), ours(policy, 2), atol=1e-4)


def test_a_folder_for_servers_holds_the_mixture(make_policy: Callable[..., MixturePolicy], tmp_path: Path) -> None:
    policy = make_policy()
    export_servers(policy, tmp_path / "served", users=True)
    mixture = json.loads((tmp_path / "served" / "mixture.json").read_text())
    assert [expert["weight"] for expert in mixture["experts"]] == policy.gate_weights().tolist()
    assert mixture["users"]["anna"] == policy.weights(user="anna").tolist()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "served" / mixture["base_model"])
    model = PeftModel.from_pretrained(base, tmp_path / "served" / "expert_0", adapter_name="expert_0")
    for expert in mixture["experts"][1:]:
        model.load_adapter(str(tmp_path / "served" / expert["path"]), adapter_name=expert["name"])
    mixed = []
    for k, expert in enumerate(mixture["experts"]):
        model.set_adapter(expert["name"])
        assert torch.allclose(log_probs_of(model, policy), ours(policy, k), atol=1e-4)
        mixed.append(log_probs_of(model, policy) + torch.tensor(expert["weight"]).log())
    assert torch.allclose(torch.logsumexp(torch.stack(mixed), 0), policy.log_prob(PROMPT, RESPONSES), atol=1e-4)
    guide = (tmp_path / "served" / "README.md").read_text()
    named = json.loads((tmp_path / "served" / "expert_0" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(tmp_path / "served" / "base")
    assert "vllm serve base" in guide and "`lm_head`" in guide and "--max-lora-rank 8" in guide


@pytest.mark.parametrize("head", ["hidden", "logit"])
def test_of_a_product_the_weighted_sum_of_output_adapters_is_the_product(
    make_policy: Callable[..., MixturePolicy], tmp_path: Path, head: str
) -> None:
    policy = make_policy(head=head)
    policy.config = replace(policy.config, feedback={"likelihood": "log_linear"})
    export_servers(policy, tmp_path / "served")
    mixture = json.loads((tmp_path / "served" / "mixture.json").read_text())
    assert mixture["combine"] == "log_linear"
    guide = (tmp_path / "served" / "README.md").read_text()
    assert "# A product of 3" in guide and "add_weighted_adapter" in guide and "random.choices" not in guide
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "served" / mixture["base_model"])
    model = PeftModel.from_pretrained(base, tmp_path / "served" / "expert_0", adapter_name="expert_0")
    for expert in mixture["experts"][1:]:
        model.load_adapter(str(tmp_path / "served" / expert["path"]), adapter_name=expert["name"])
    names, weights = zip(*((expert["name"], expert["weight"]) for expert in mixture["experts"]), strict=True)
    model.add_weighted_adapter(list(names), list(weights), "blend", combination_type="cat")
    model.set_adapter("blend")
    assert torch.allclose(log_probs_of(model, policy), policy.log_prob(PROMPT, RESPONSES), atol=1e-4)


@pytest.mark.parametrize("likelihood", ["mbt", "log_linear"])
def test_the_python_of_the_guide_runs_as_printed(
    make_policy: Callable[..., MixturePolicy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, likelihood: str
) -> None:
    policy = make_policy()
    policy.config = replace(policy.config, feedback={"likelihood": likelihood})
    export_servers(policy, tmp_path / "served")
    monkeypatch.chdir(tmp_path / "served")
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, found := {})
        if "PeftModel" in found and "names" not in found:
            assert torch.allclose(log_probs_of(found["model"], policy), ours(policy, 0), atol=1e-4)


def test_the_guide_says_how_a_server_gets_the_base(
    make_policy: Callable[..., MixturePolicy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    folder = tmp_path / "cache" / "smollm2-135m-instruct-q4_1"
    policy.model.experts.base_model.save_pretrained(folder)
    monkeypatch.setenv("PREFMIX_CACHE", str(tmp_path / "cache"))
    policy.config = replace(policy.config, base_source="smollm2-q4_1")
    export_servers(policy, tmp_path / "named")
    guide = (tmp_path / "named" / "README.md").read_text()
    assert f"base: `{folder}`" in guide and "copy that folder beside" in guide and "--with_base" in guide
    assert "GGUF, Q4_1" in guide and "not those of `HuggingFaceTB/SmolLM2-135M-Instruct`" in guide
    export_servers(policy, tmp_path / "whole", with_base=True)
    guide = (tmp_path / "whole" / "README.md").read_text()
    assert "vllm serve base" in guide and str(folder) not in guide and "GGUF, Q4_1" in guide
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "whole" / "expert_1")
    assert torch.allclose(log_probs_of(model, policy), ours(policy, 1), atol=1e-4)
    policy.config = replace(policy.config, base_source="owner/name")
    export_servers(policy, tmp_path / "hub")
    guide = (tmp_path / "hub" / "README.md").read_text()
    assert "fetch the base from the hub" in guide and "Q4_1" not in guide


def test_users_are_left_out_unless_asked_for(make_policy: Callable[..., MixturePolicy], tmp_path: Path) -> None:
    export_servers(make_policy(), tmp_path / "served")
    assert "anna" not in (tmp_path / "served" / "mixture.json").read_text()


@pytest.mark.parametrize("export", [export_adapter, export_merged])
def test_nothing_is_overwritten_and_nothing_half_written(
    make_policy: Callable[..., MixturePolicy], tmp_path: Path, export: Callable[..., None]
) -> None:
    policy = make_policy()
    export(policy, 0, tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        export(policy, 1, tmp_path / "out")
    with pytest.raises(ValueError, match="experts 0 to 2"):
        export(policy, 3, tmp_path / "other")
    with pytest.raises(ValueError, match="--format merged"):
        export_adapter(make_policy(head="full"), 0, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_independent_expert_is_already_a_model(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    experts = IndependentExperts([make_tiny_model(1), make_tiny_model(2, hidden_size=16)], make_tiny_model())
    config = PolicyConfig((0.1, 0.1), "user", "<base>", "0" * 64, max_length=64)
    policy = MixturePolicy(MixtureModel(experts, Gate(2, ("global",))), tiny_tokenizer, config)
    export_merged(policy, 1, tmp_path / "merged", dtype=torch.bfloat16)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    expected = experts.expert_models[1].get_input_embeddings().weight.bfloat16()
    assert torch.equal(merged.get_input_embeddings().weight, expected)
    with pytest.raises(ValueError, match="--format merged"):
        export_servers(policy, tmp_path / "served")
    assert experts.expert_models[1].dtype == torch.float32


@pytest.mark.parametrize("trunk", ["frozen", "lora", "full"])
@pytest.mark.parametrize("head", ["none", "hidden"])
def test_branches_are_exported_too(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, head: str, trunk: str
) -> None:
    experts = BranchedExperts(make_tiny_model(), 2, branch_depth=1, head=head, rank=2, trunk=trunk)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    config = PolicyConfig((0.1, 0.1), "user", "<base>", "0" * 64, max_length=64)
    policy = MixturePolicy(MixtureModel(experts, Gate(2, ("global",))), tiny_tokenizer, config)
    export_merged(policy, 1, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(log_probs_of(merged, policy), ours(policy, 1), atol=1e-4)
