"""A saved policy is the same policy, and nothing else is loaded in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from prefmix.experts.base_model import load_base
from prefmix.policy.mixture_policy import MixturePolicy

PROMPT, RESPONSES = "Where is the sun?", ["In the sky.", "In the sea."]


@pytest.fixture
def base(tmp_path, make_tiny_model, tiny_tokenizer):
    folder = tmp_path / "base"
    make_tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return load_base(folder, dtype=torch.float32)


@pytest.fixture
def make_stored(make_policy, base):
    def build(latent="user", terms=("global",), **fields):
        return make_policy(latent, terms, model=base.model, base_source=base.source, base_sha256=base.sha256, **fields)

    return build


def answers(policy, **fields):
    return policy.log_prob(PROMPT, RESPONSES, **fields)


@pytest.mark.parametrize("head", ["hidden", "logit", "full"])
@pytest.mark.parametrize(
    "latent, terms",
    [("user", ["global"]), ("user", ["global", "metadata"]), ("pair", ["global", "prompt", "user"])],
    ids=str,
)
def test_round_trip(make_stored, tmp_path, head, latent, terms):
    policy = make_stored(latent, terms, head=head)
    policy.save_pretrained(tmp_path / "policy")
    loaded = MixturePolicy.from_pretrained(tmp_path / "policy", device="cpu")
    metadata = {"user_age": 35} if "metadata" in terms else None
    for user in (None, "anna", "bob"):
        assert torch.equal(answers(loaded, user=user, metadata=metadata), answers(policy, user=user, metadata=metadata))
    assert loaded.users.names == policy.users.names
    assert loaded.config == policy.config
    assert loaded.generate(PROMPT, seed=3, max_new_tokens=8) == policy.generate(PROMPT, seed=3, max_new_tokens=8)


def test_the_folder_holds_no_pickle_and_not_the_base(make_stored, tmp_path):
    make_stored().save_pretrained(tmp_path / "policy")
    files = sorted(path.relative_to(tmp_path / "policy").as_posix() for path in (tmp_path / "policy").rglob("*.*"))
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".md", ".jinja"}
    assert {"expert_2/head.safetensors", "gate/gate.safetensors", "users/users.safetensors", "README.md"} <= set(files)
    assert not any(name.startswith("base/") for name in files)


def test_equal_policies_are_equal_files(make_stored, tmp_path):
    policy = make_stored()
    policy.save_pretrained(tmp_path / "a")
    policy.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_another_base_is_refused_and_a_moved_one_is_accepted(make_stored, tmp_path, make_tiny_model, tiny_tokenizer):
    policy = make_stored()
    policy.save_pretrained(tmp_path / "policy")
    make_tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="sha256.*give that model with base="):
        MixturePolicy.from_pretrained(tmp_path / "policy", base=tmp_path / "other")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="base="):
        MixturePolicy.from_pretrained(tmp_path / "policy")
    loaded = MixturePolicy.from_pretrained(tmp_path / "policy", base=tmp_path / "moved", device="cpu")
    assert torch.equal(answers(loaded), answers(policy))
    assert loaded.config.base_source == str(tmp_path / "moved"), "what is exported now names the new place"
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(answers(MixturePolicy.from_pretrained(tmp_path / "again", device="cpu")), answers(policy))


def test_a_loaded_base_serves_several_policies(make_stored, tmp_path, make_tiny_model):
    policy = make_stored()
    policy.save_pretrained(tmp_path / "policy")
    base = load_base(tmp_path / "base")
    loaded = MixturePolicy.from_pretrained(tmp_path / "policy", base=base, device="cpu")
    assert loaded.model.experts.base_model is base.model
    assert torch.equal(answers(loaded), answers(policy))
    with pytest.raises(ValueError, match=r"base model <.*object>: sha256.*give that model with base="):
        MixturePolicy.from_pretrained(tmp_path / "policy", base=load_base(make_tiny_model(seed=1)))
    with pytest.raises(ValueError, match="base model of type int: give a folder"):
        MixturePolicy.from_pretrained(tmp_path / "policy", base=3)


def test_a_base_that_exists_in_memory_alone_is_copied(make_policy, make_tiny_model, tmp_path):
    base = load_base(make_tiny_model())
    policy = make_policy(model=base.model, base_source=base.source, base_sha256=base.sha256)
    policy.save_pretrained(tmp_path / "policy")
    assert (tmp_path / "policy" / "base" / "model.safetensors").is_file()
    (tmp_path / "policy").rename(tmp_path / "elsewhere")
    loaded = MixturePolicy.from_pretrained(tmp_path / "elsewhere", device="cpu")
    assert torch.equal(answers(loaded), answers(policy))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(answers(MixturePolicy.from_pretrained(tmp_path / "again", device="cpu")), answers(policy))


@pytest.mark.parametrize(
    "name",
    ["expert_1/head.safetensors", "gate/gate.safetensors", "users/users.json", "mixture_config.json", "tokenizer.json"],
)
def test_a_damaged_file_is_named(make_stored, tmp_path, name):
    make_stored().save_pretrained(tmp_path / "policy")
    file = tmp_path / "policy" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged policy: {name} has changed"):
        MixturePolicy.from_pretrained(tmp_path / "policy")


def test_user_state_can_be_left_out(make_stored, tmp_path):
    for latent, terms in (("user", ["global"]), ("pair", ["global", "user"])):
        policy = make_stored(latent, terms)
        policy.save_pretrained(tmp_path / latent, user_state=False)
        text = "".join(path.read_bytes().decode("latin1") for path in (tmp_path / latent).rglob("*") if path.is_file())
        assert "anna" not in text
        loaded = MixturePolicy.from_pretrained(tmp_path / latent, device="cpu")
        assert len(loaded.users) == 0
        with pytest.warns(UserWarning, match="unknown users"):
            assert torch.allclose(loaded.weights(user="anna"), policy.weights())


def test_saving_over_an_earlier_policy_replaces_it_as_a_whole(make_stored, tmp_path):
    make_stored(num_experts=4).save_pretrained(tmp_path / "policy")
    make_stored(num_experts=2).save_pretrained(tmp_path / "policy")
    assert sorted(path.name for path in (tmp_path / "policy").glob("expert_*")) == ["expert_0", "expert_1"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a policy"):
        make_stored().save_pretrained(tmp_path / "other")


def test_the_card_says_what_is_known_and_what_is_not(make_stored, tmp_path):
    make_stored().save_pretrained(tmp_path / "policy")
    card = (tmp_path / "policy" / "README.md").read_text()
    for fact in ("2510.08256", "3 expert policies", "licence is not recorded", "data_sha256", "2 users", "torch"):
        assert fact in card
    assert card.startswith("---\nlibrary_name: prefmix\n")
    assert (
        "Held-out" not in card and "training time" not in card and not (tmp_path / "policy" / "training.json").exists()
    )


def test_the_record_of_training_reaches_the_card_and_survives_saving_again(make_stored, tmp_path):
    policy = make_stored()
    held_out = {"accuracy": 0.75, "loss": 0.5, "population_accuracy": 0.625, "population_loss": 0.6}
    policy.record = {
        "data": "owner/prefs", "first_step": 0, "seconds": 12.3, "cpu_seconds": 11.0, "peak_memory_bytes": 2**30,
        "trained_parameters": 1234, "base_parameters": 56789, "machine": "a machine", "held_out": held_out,
    }  # fmt: skip
    policy.save_pretrained(tmp_path / "policy")
    again = MixturePolicy.from_pretrained(tmp_path / "policy")
    assert again.record == policy.record
    again.save_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["datasets"] == ["owner/prefs"] and head["pipeline_tag"] == "text-generation"
    for fact in (
        "| 0.750 | 0.500 |",
        "| 0.625 | 0.600 |",
        "12 s, 11 CPU seconds",
        "1.00 GiB",
        "1,234 trained",
        "`abc`",
    ):
        assert fact in card
    assert "training.json" not in (tmp_path / "again" / "manifest.json").read_text()  # each time another number
    (tmp_path / "again" / "training.json").write_text("not json")
    assert MixturePolicy.from_pretrained(tmp_path / "again").record == {}


@pytest.mark.parametrize("source", ["rows.jsonl", "data/rows.jsonl", "/data/rows.jsonl", "../up/rows.jsonl", "a: b/c"])
def test_only_names_of_the_hub_stand_in_its_metadata(make_stored, tmp_path, source):
    policy = make_stored()
    policy.record = {"data": source}
    policy.save_pretrained(tmp_path / "policy")
    assert "datasets" not in yaml.safe_load((tmp_path / "policy" / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("head", ["hidden", "logit"])
def test_an_expert_loads_alone_as_a_peft_adapter(make_stored, tmp_path, head, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = make_stored(head=head)
    policy.save_pretrained(tmp_path / "policy")
    ours = policy.log_prob(PROMPT, RESPONSES, per_expert=True)
    for expert in range(3):
        alone = AutoModelForCausalLM.from_pretrained(base.source, dtype=torch.float32)
        model = PeftModel.from_pretrained(alone, str(tmp_path / "policy" / f"expert_{expert}")).eval()
        for row, response in enumerate(RESPONSES):
            prompt_ids = policy.tokenizer(PROMPT)["input_ids"]
            ids = torch.tensor([policy.tokenizer(PROMPT + response + policy.tokenizer.eos_token)["input_ids"]])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total = log_probs.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :].sum()
            assert float(total) == pytest.approx(float(ours[row, expert]), abs=1e-3)


def test_a_full_head_is_no_adapter(make_stored, tmp_path):
    make_stored(head="full").save_pretrained(tmp_path / "policy")
    assert not list((tmp_path / "policy").rglob("adapter*"))


def test_a_newer_format_is_refused(make_stored, tmp_path):
    make_stored().save_pretrained(tmp_path / "policy")
    config, manifest = tmp_path / "policy" / "mixture_config.json", tmp_path / "policy" / "manifest.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format_version": 2}))
    hashes = json.loads(manifest.read_text())
    del hashes["sha256"]["mixture_config.json"]
    manifest.write_text(json.dumps(hashes))
    with pytest.raises(ValueError, match="format_version=2"):
        MixturePolicy.from_pretrained(tmp_path / "policy")
