"""Whole models, given experts, frozen experts, and the gate alone: what moves in training and what must not."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmix.experts.independent import IndependentExperts
from prefmix.policy.adapters import write_adapter
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.config import MixtureConfig
from prefmix.training.starting_experts import FrozenExperts
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprints(trainer: MixtureTrainer) -> list[str]:
    experts = trainer.mixture.experts
    return [fingerprint(experts.expert_state(k)) for k in range(experts.num_experts)]


@pytest.mark.parametrize(
    "kind",
    [
        {"head": "hidden"},
        {"head": "full"},
        {"branch_depth": 1, "head": "hidden", "cache_states": "off"},
        {"expert_kind": "independent", "learning_rate": 1e-3, "cache_states": "off"},
    ],
    ids=lambda kind: " ".join(map(str, list(kind.values())[:2])),
)
def test_frozen_experts_stay_bit_for_bit(make_trainer: Make, kind: dict[str, Any]) -> None:
    trainer = make_trainer(
        num_experts=3, freeze_experts=[0, 2], weight_decay=0.1, num_train_epochs=1, init="random", **kind
    )
    with torch.no_grad():  # not all zeros, which weight decay would leave alone
        for parameter in trainer.mixture.experts.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    trainer.frozen = FrozenExperts(trainer.mixture.experts, [0, 2], train_experts=True)
    before = fingerprints(trainer)
    trainer.train()
    after = fingerprints(trainer)
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]


@pytest.fixture
def trained(make_trainer: Make, tmp_path: Path) -> Path:
    """A policy folder of two trained experts."""
    trainer = make_trainer(tmp_path / "first", num_train_epochs=3, learning_rate=5e-2, init="labels")
    trainer.train()
    return tmp_path / "first" / "policy"


def test_the_gate_alone_learns_over_given_experts(make_trainer: Make, trained: Path, tmp_path: Path, rows: Any) -> None:
    """Rows of one group only: the weights must go to the expert that explains them; the experts stay."""
    experts = MixturePolicy.from_pretrained(trained, device="cpu").model.experts
    given = [fingerprint(experts.expert_state(k)) for k in range(2)]
    trainer = make_trainer(
        tmp_path / "second",
        data=[row for row in rows if row["group"] == "a"],
        init_experts=[str(trained)],
        train_experts=False,
    )
    assert trainer.init == "experts"
    trainer.train()
    assert trainer.hold_steps == 0 and fingerprints(trainer) == given
    weights = trainer.mixture.gate.population_log_weights().exp()
    evidence = trainer.em.evidence.group_evidence().sum(0)
    assert weights.argmax() == evidence.argmax() and weights.max() > 0.9
    saved = MixturePolicy.from_pretrained(tmp_path / "second" / "policy", device="cpu")
    assert torch.allclose(saved.gate_weights(), weights.double(), atol=1e-6)


def test_a_prompt_gate_alone_learns_by_gradient(make_trainer: Make, trained: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "second", init_experts=[str(trained)], train_experts=False, gate=["global", "prompt"], latent="pair"
    )
    before = fingerprints(trainer)
    trainer.train()
    assert fingerprints(trainer) == before
    assert trainer.mixture.gate.prompt.weight.abs().max() > 0


def test_given_experts_train_on(make_trainer: Make, trained: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "second", init_experts=[str(trained)], expert_rank=1, num_train_epochs=1)
    assert trainer.mixture.experts.describe()["rank"] == 2  # the given experts' rank, not less
    first = MixturePolicy.from_pretrained(trained, device="cpu").model.experts
    assert fingerprints(trainer) == [fingerprint(first.expert_state(k)) for k in range(2)]
    trainer.train()
    assert fingerprints(trainer) != [fingerprint(first.expert_state(k)) for k in range(2)]


def test_adapters_are_starts(make_trainer: Make, trained: Path, tmp_path: Path) -> None:
    experts = MixturePolicy.from_pretrained(trained, device="cpu").model.experts
    for k in range(2):
        (tmp_path / f"adapter_{k}").mkdir()
        write_adapter(experts, k, tmp_path / f"adapter_{k}", "base")
    starts = [str(tmp_path / "adapter_1"), str(tmp_path / "adapter_0")]
    trainer = make_trainer(tmp_path / "second", init_experts=starts)
    batch = next(iter(trainer.get_train_dataloader()))
    states = {name: batch[name] for name in ("hidden", "targets", "segments")}
    from prefmix.experts.interface import PackedStates

    texts = PackedStates(**states, num_texts=len(batch["text_ids"]))
    with torch.no_grad():
        found, given = trainer.mixture.experts(texts).log_probs, experts(texts).log_probs
    assert torch.allclose(found, given[:, [1, 0]], atol=1e-3)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_another_number_of_experts_is_refused(
    make_trainer: Make, trained: Path, tmp_path: Path, num_experts: int
) -> None:
    with pytest.raises(ValueError, match=rf"policy has 2 experts, not num_experts={num_experts}; set num_experts=2"):
        make_trainer(tmp_path / "second", init_experts=[str(trained)], num_experts=num_experts)


def test_a_policy_is_named_alone(make_trainer: Make, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a policy among 2 names; name one policy alone"):
        make_trainer(tmp_path / "second", init_experts=[str(trained), str(trained / "expert_1")])


def test_one_adapter_for_all_makes_equal_experts(make_trainer: Make, trained: Path, tmp_path: Path) -> None:
    """Their own posteriors are uniform at every step: something else must part them, and a gate alone cannot."""
    one = [str(trained / "expert_0")]
    trainer = make_trainer(tmp_path / "second", init_experts=one, learning_rate=2e-3)
    assert len(set(fingerprints(trainer))) == 1 and trainer.init == "probe" and trainer.hold_steps == 0
    trainer.train()
    assert trainer.hold_steps > 0 and len(set(fingerprints(trainer))) == 2
    assert (trainer.em.resp.max(dim=1).values > 0.6).any()
    for fields in ({"init": "experts"}, {"train_experts": False}):
        with pytest.raises(ValueError, match="start from one adapter are equal"):
            make_trainer(tmp_path / "third", init_experts=one, **fields)


def test_a_policy_over_another_base_is_refused(make_trainer: Make, trained: Path, tmp_path: Path) -> None:
    file = trained / "mixture_config.json"
    from prefmix.policy.config import PolicyConfig
    from prefmix.policy.folder import MANIFEST

    text = file.read_text().replace(PolicyConfig.from_json(file.read_text()).base_sha256, "0" * 64)
    file.write_text(text)
    (trained / MANIFEST).write_text('{"sha256": {}}')
    with pytest.raises(ValueError, match="belong to base"):
        make_trainer(tmp_path / "second", init_experts=[str(trained)])
    with pytest.raises(ValueError, match="no policy here"):
        make_trainer(tmp_path / "third", init_experts=[str(tmp_path)])


def test_whole_models_of_two_sizes_train_save_and_resume(
    make_trainer: Make, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for name, sizes in (("small", {"hidden_size": 16}), ("large", {"num_hidden_layers": 3})):
        make_tiny_model(1, **sizes).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    fields = {
        "expert_kind": "independent",
        "expert_models": [str(tmp_path / "small"), str(tmp_path / "large")],
        "learning_rate": 2e-3,
        "gradient_checkpointing": True,
        "cache_states": "off",
        "init": "random",
    }
    trainer = make_trainer(tmp_path / "whole", **fields)
    assert isinstance(trainer.mixture.experts, IndependentExperts) and trainer.train_comparisons.states is None
    assert torch.allclose(trainer.refresh_evidence(), torch.tensor(0.5).log().double())  # every margin starts at zero
    trainer.train()
    loaded = MixturePolicy.from_pretrained(tmp_path / "whole", device="cpu")
    expected = trainer.policy.log_prob("What is it?", ["great", "bad"], per_expert=True)
    assert torch.allclose(loaded.log_prob("What is it?", ["great", "bad"], per_expert=True), expected, atol=1e-5)
    shapes = [model.config.hidden_size for model in loaded.model.experts.expert_models]
    assert shapes == [16, 32]
    whole = fingerprints(trainer)
    for path in ("policy", "checkpoint-12"):
        shutil.rmtree(tmp_path / "whole" / path)
    (tmp_path / "whole" / "finished.json").unlink()
    resumed = make_trainer(tmp_path / "whole", **fields)
    assert fingerprints(resumed) != whole
    resumed.train(resume_from_checkpoint=True)
    assert fingerprints(resumed) == whole


def test_another_tokenizer_is_refused(
    make_trainer: Make, make_tiny_model: Callable[..., Any], tiny_chat_tokenizer: Any, tmp_path: Path
) -> None:
    make_tiny_model(1).save_pretrained(tmp_path / "other")
    other = copy.deepcopy(tiny_chat_tokenizer)
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another tokenizer"):
        make_trainer(expert_kind="independent", expert_models=[str(tmp_path / "other")], cache_states="off")


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"train_experts": False}, "name init_experts"),
        ({"freeze_experts": [4]}, "name experts 0 to 3"),
        ({"freeze_experts": [0, 1, 2, 3]}, "train_experts=false"),
        ({"init": "experts"}, "equal experts say nothing"),
        ({"init": "experts", "init_experts": ["a"] * 4}, "equal experts say nothing"),
        (
            {"expert_kind": "independent", "expert_models": ["a"], "reference": "shared", "init": "experts"},
            "that differ",
        ),
        ({"expert_models": ["a"]}, "only expert_kind='independent'"),
        ({"expert_kind": "independent", "head": "full"}, "whole models train"),
        ({"expert_kind": "independent", "expert_models": ["a", "b"]}, "2 names for num_experts=4"),
        ({"expert_kind": "independent", "init_experts": ["a"]}, "expert_models"),
        ({"expert_kind": "independent", "expert_devices": ["cpu"]}, "one each of 4"),
        ({"gradient_checkpointing": True}, "heads on a frozen trunk keep no activations"),
        ({"init_experts": ["a"], "train_experts": False, "gate_update": "fixed"}, "nothing would train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_refused_with_the_configuration(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        MixtureConfig(str(tmp_path), **fields)


@pytest.mark.parametrize(
    "fields, rate",
    [({}, 1e-3), ({"branch_depth": 2}, 2e-4), ({"expert_kind": "independent"}, 1e-6), ({"learning_rate": 0.5}, 0.5)],
)
def test_the_learning_rate_suits_the_kind(fields: dict[str, Any], rate: float, tmp_path: Path) -> None:
    assert MixtureConfig(str(tmp_path), **fields).learning_rate == rate
