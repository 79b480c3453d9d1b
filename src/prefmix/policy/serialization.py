"""A policy as a folder: safetensors and JSON, never pickle.

Layout:
    mixture_config.json         `PolicyConfig`
    expert_0/head.safetensors   the tensors of expert 0, the source of truth; also a PEFT adapter where there is one;
                                a whole model's folder for independent experts
    trunk.safetensors           what a trained trunk learned, which all experts share
    gate/gate.safetensors       the gate's state; gate/metadata.json the encoder of metadata, if there is one
    users/users.json            user names; users/users.safetensors their evidence (absent without user state)
    base/                       the base model, only where it cannot be found again elsewhere
    training.json               what training cost and reached, for people; absent where nobody said
    tokenizer files, README.md (the model card), manifest.json (SHA-256 of every file but itself, record and card)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefmix.data.users import MetadataEncoder
from prefmix.experts.base_model import BaseModel, BaseSource, load_base
from prefmix.mixture.gates import Gate
from prefmix.policy.config import PolicyConfig
from prefmix.policy.expert_files import can_be_found_again, load_tensors, read_experts, save_tensors, write_experts
from prefmix.policy.folder import CONFIG_FILE, RECORD_FILE, damaged_files, find_policy, replacing_folder
from prefmix.policy.metadata_fields import silent_fields
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.model_card import model_card
from prefmix.policy.user_state import UserState

BASE_COPY = "./base"


class PolicyParts(NamedTuple):
    """What a policy folder holds, loaded.

    Attributes:
        model: experts and gate, in evaluation mode.
        tokenizer: the tokenizer of training.
        config: `mixture_config.json`.
        users: user state; empty where it was left out.
        metadata_encoder: encoder of metadata, or None.
        record: `training.json`; empty where there is none.
    """

    model: MixtureModel
    tokenizer: PreTrainedTokenizerBase
    config: PolicyConfig
    users: UserState
    metadata_encoder: MetadataEncoder | None
    record: Mapping[str, Any] = MappingProxyType({})


def write_policy(
    path: str | Path, parts: PolicyParts, *, user_state: bool = True, experts_folder: Path | None = None
) -> None:
    """Writes or replaces a policy folder atomically.

    Args:
        path: the folder; an existing policy there is replaced, anything else is refused.
        parts: what to write.
        user_state: whether anything about single users is written: names, evidence, rows of the gate's user term.
        experts_folder: see `write_experts`.

    Raises:
        ValueError: `path` holds something that is not a policy.
    """
    with replacing_folder(Path(path), marker=CONFIG_FILE) as folder:
        config = parts.config
        if config.base_source == BASE_COPY or not can_be_found_again(config.base_source):
            config = _copy_base(parts, folder)
        elif Path(config.base_source).exists():
            config = replace(config, base_source=os.path.abspath(config.base_source))
        config = write_experts(parts.model.experts, folder, config, parts.tokenizer, experts_folder)
        config = _write_gate(parts, config, folder, user_state)
        if user_state:
            (folder / "users").mkdir()
            _write_json(folder / "users" / "users.json", parts.users.names)
            save_tensors(parts.users.tensors(), folder / "users" / "users.safetensors")
        parts.tokenizer.save_pretrained(str(folder))
        users = parts.users if user_state else None
        card = model_card(config, users, parts.record, _metadata_fields(parts))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if parts.record:
            _write_json(folder / RECORD_FILE, dict(parts.record))
        (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")


def read_policy(
    path: str | Path, *, base: BaseSource | None = None, device: str | torch.device | None = None
) -> PolicyParts:
    """Loads a policy folder after checking every file against the manifest.

    Args:
        path: see `find_policy`.
        base: where the base model is now, if not where it was; its content must be the same.
        device: where to put the model; null: where `load_base` puts it.

    Raises:
        ValueError: no policy, damaged files, another format, or another base model.
    """
    folder = find_policy(path)
    problems = damaged_files(folder)
    if problems:
        raise ValueError(f"{folder}: damaged policy: {'; '.join(problems)}; restore these files or save again")
    config = PolicyConfig.from_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    loaded = _load_checked_base(folder, config, base)
    moved = base is not None and config.base_source not in (BASE_COPY, loaded.source)
    if moved and can_be_found_again(loaded.source):  # what is saved or exported from now on names this place
        config = replace(config, base_source=loaded.source, base_revision=None, base_gguf_file=None)
    model = _load_model(folder, config, loaded.model)
    users = UserState.empty(config.num_experts)
    if (folder / "users" / "users.json").is_file():
        names = json.loads((folder / "users" / "users.json").read_text(encoding="utf-8"))
        users = UserState(names, **load_tensors(folder / "users" / "users.safetensors"))
    encoder_file = folder / "gate" / "metadata.json"
    encoder = (
        MetadataEncoder.from_dict(json.loads(encoder_file.read_text(encoding="utf-8")))
        if encoder_file.is_file()
        else None
    )
    model = model.to(device) if device is not None else model
    return PolicyParts(model.eval(), _load_tokenizer(folder), config, users, encoder, _read_record(folder))


def _metadata_fields(parts: PolicyParts) -> dict[str, bool]:
    """Fields that the gate reads, and whether they have any weight in it."""
    silent = silent_fields(parts.model.gate, parts.metadata_encoder)
    names = parts.metadata_encoder.field_names if parts.metadata_encoder is not None else []
    return {name: name not in silent for name in names}


def _read_record(folder: Path) -> dict[str, Any]:
    """What training cost and reached; it stands outside the manifest, so what cannot be read is left out."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _load_model(folder: Path, config: PolicyConfig, base: PreTrainedModel) -> MixtureModel:
    experts = read_experts(folder, config, base)
    gate = Gate(**config.gate)
    gate.load_state_dict(load_tensors(folder / "gate" / "gate.safetensors"))
    return MixtureModel(experts, gate)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def _load_checked_base(folder: Path, config: PolicyConfig, base: BaseSource | None) -> BaseModel:
    source = base if base is not None else config.base_source
    if source == BASE_COPY:
        source = folder / "base"
    options: dict[str, Any] = {}
    if base is None:
        options = {"revision": config.base_revision, "gguf_file": config.base_gguf_file}
    try:
        dtype = getattr(torch, config.dtype) if config.dtype else None
        loaded = load_base(source, dtype=dtype, quantization=config.quantization, **options)
    except ValueError as error:
        raise ValueError(f"{error}; if the base model has moved, say where it is with base=") from error
    if loaded.sha256 != config.base_sha256:
        raise ValueError(
            f"base model {loaded.source}: sha256 {loaded.sha256[:12]}..., but the experts were trained on "
            f"{config.base_sha256[:12]}... ({config.base_source}); give that model with base="
        )
    return loaded


def _copy_base(parts: PolicyParts, folder: Path) -> PolicyConfig:
    """Writes the base model into the policy folder and returns the config that points there."""
    parts.model.experts.base_model.save_pretrained(str(folder / "base"))
    parts.tokenizer.save_pretrained(str(folder / "base"))
    dtype = getattr(torch, parts.config.dtype) if parts.config.dtype else None
    copied = load_base(folder / "base", dtype=dtype, quantization=parts.config.quantization)
    return replace(
        parts.config, base_source=BASE_COPY, base_sha256=copied.sha256, base_revision=None, base_gguf_file=None
    )


def _write_gate(parts: PolicyParts, config: PolicyConfig, folder: Path, user_state: bool) -> PolicyConfig:
    """Writes the gate and returns the config that describes what was written."""
    state, description = parts.model.gate.state_dict(), parts.model.gate.describe()
    if "user" in state and not user_state:
        state["user"], description["num_users"] = state["user"][:0], 0
    (folder / "gate").mkdir()
    save_tensors(state, folder / "gate" / "gate.safetensors")
    if parts.metadata_encoder is not None:
        _write_json(folder / "gate" / "metadata.json", parts.metadata_encoder.to_dict())
    return replace(config, gate=description)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
