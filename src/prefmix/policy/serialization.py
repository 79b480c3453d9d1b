"""A policy as a folder: safetensors and JSON, never pickle.

Layout:
    mixture_config.json         `PolicyConfig`
    expert_0/head.safetensors   the tensors of expert 0, the source of truth; also a PEFT adapter where there is one
    gate/gate.safetensors       the gate's state; gate/metadata.json the encoder of metadata, if there is one
    users/users.json            user names; users/users.safetensors their evidence (absent without user state)
    base/                       the base model, only where it cannot be found again elsewhere
    tokenizer files, README.md (the model card), manifest.json (SHA-256 of every file but the card)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefmix.data.users import MetadataEncoder
from prefmix.experts.base_model import BaseModel, load_base
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.adapters import write_adapter
from prefmix.policy.config import PolicyConfig
from prefmix.policy.folder import damaged_files, intact_folder, replacing_folder
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.model_card import model_card
from prefmix.policy.user_state import UserState

CONFIG_FILE = "mixture_config.json"
BASE_COPY = "./base"


class PolicyParts(NamedTuple):
    """What a policy folder holds, loaded.

    Attributes:
        model: experts and gate, in evaluation mode.
        tokenizer: the tokenizer of training.
        config: `mixture_config.json`.
        users: user state; empty where it was left out.
        metadata_encoder: encoder of metadata, or None.
    """

    model: MixtureModel
    tokenizer: PreTrainedTokenizerBase
    config: PolicyConfig
    users: UserState
    metadata_encoder: MetadataEncoder | None


def _shared_base(base: PreTrainedModel, description: dict[str, Any]) -> AbstractExperts:
    fields = {name: value for name, value in description.items() if name in ("num_experts", "head", "rank")}
    return SharedBaseExperts(base, **fields)


EXPERT_KINDS: dict[str, Callable[[PreTrainedModel, dict[str, Any]], AbstractExperts]] = {"shared_base": _shared_base}


def write_policy(path: str | Path, parts: PolicyParts, *, user_state: bool = True) -> None:
    """Writes or replaces a policy folder atomically.

    Args:
        path: the folder; an existing policy there is replaced, anything else is refused.
        parts: what to write.
        user_state: whether names and evidence of users are written (rows of the gate's user term always are).

    Raises:
        ValueError: `path` holds something that is not a policy.
    """
    with replacing_folder(Path(path), marker=CONFIG_FILE) as folder:
        config = parts.config
        if config.base_source == BASE_COPY or not _can_be_found_again(config.base_source):
            config = _copy_base(parts, folder)
        for expert in range(config.num_experts):
            (folder / f"expert_{expert}").mkdir()
            _save(parts.model.experts.expert_state(expert), folder / f"expert_{expert}" / "head.safetensors")
            write_adapter(parts.model.experts, expert, folder / f"expert_{expert}", config.base_source)
        (folder / "gate").mkdir()
        _save(parts.model.gate.state_dict(), folder / "gate" / "gate.safetensors")
        if parts.metadata_encoder is not None:
            _write_json(folder / "gate" / "metadata.json", parts.metadata_encoder.to_dict())
        if user_state:
            (folder / "users").mkdir()
            _write_json(folder / "users" / "users.json", parts.users.names)
            _save(parts.users.tensors(), folder / "users" / "users.safetensors")
        parts.tokenizer.save_pretrained(str(folder))
        (folder / "README.md").write_text(model_card(config, parts.users if user_state else None), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")


def find_policy(path: str | Path) -> Path:
    """The policy folder that `path` means: itself, its subfolder `policy`, or what a killed save left beside it.

    Raises:
        ValueError: there is none.
    """
    for candidate in (Path(path), Path(path) / "policy"):
        found = intact_folder(candidate, marker=CONFIG_FILE)
        if found is not None:
            return found
    raise ValueError(f"{path}: no policy here (no {CONFIG_FILE}); give the folder that save_pretrained or train wrote")


def read_policy(
    path: str | Path, *, base: str | Path | PreTrainedModel | None = None, device: str | torch.device | None = None
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
    model = _load_model(folder, config, loaded.model)
    users = UserState.empty(config.num_experts)
    if (folder / "users" / "users.json").is_file():
        names = json.loads((folder / "users" / "users.json").read_text(encoding="utf-8"))
        users = UserState(names, **_load(folder / "users" / "users.safetensors"))
    encoder_file = folder / "gate" / "metadata.json"
    encoder = (
        MetadataEncoder.from_dict(json.loads(encoder_file.read_text(encoding="utf-8")))
        if encoder_file.is_file()
        else None
    )
    model = model.to(device) if device is not None else model
    return PolicyParts(model.eval(), _load_tokenizer(folder), config, users, encoder)


def _load_model(folder: Path, config: PolicyConfig, base: PreTrainedModel) -> MixtureModel:
    kind = config.experts.get("kind")
    if kind not in EXPERT_KINDS:
        raise ValueError(f"{folder}: experts of kind {kind!r}, this prefmix knows {sorted(EXPERT_KINDS)}; update prefmix")
    experts = EXPERT_KINDS[kind](base, dict(config.experts))
    for expert in range(config.num_experts):
        experts.load_expert_state(expert, _load(folder / f"expert_{expert}" / "head.safetensors"))
    gate = Gate(**config.gate)
    gate.load_state_dict(_load(folder / "gate" / "gate.safetensors"))
    return MixtureModel(experts, gate)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def _load_checked_base(folder: Path, config: PolicyConfig, base: str | Path | PreTrainedModel | None) -> BaseModel:
    source = base if base is not None else config.base_source
    if source == BASE_COPY:
        source = folder / "base"
    options: dict[str, Any] = {}
    if base is None:
        options = {"revision": config.base_revision, "gguf_file": config.base_gguf_file}
    try:
        loaded = load_base(source, dtype=getattr(torch, config.dtype) if config.dtype else None, **options)
    except OSError as error:
        raise ValueError(
            f"base model {source}: cannot be loaded ({str(error).splitlines()[0]}); say where it is with base="
        ) from error
    if loaded.sha256 != config.base_sha256:
        raise ValueError(
            f"base model {source}: sha256 {loaded.sha256[:12]}..., but the experts were trained on "
            f"{config.base_sha256[:12]}... ({config.base_source}); give that model with base="
        )
    return loaded


def _can_be_found_again(source: str) -> bool:
    """Whether `source` is a folder, or looks like a name on the hub (owner/name) or a name that `load_base` knows."""
    if not source or source.startswith("<"):
        return False
    return Path(source).exists() or not Path(source).is_absolute()


def _copy_base(parts: PolicyParts, folder: Path) -> PolicyConfig:
    """Writes the base model into the policy folder and returns the config that points there."""
    base = getattr(parts.model.experts, "base_model", None)
    assert isinstance(base, PreTrainedModel), "experts over a shared base hold it as base_model"
    base.save_pretrained(str(folder / "base"))
    parts.tokenizer.save_pretrained(str(folder / "base"))
    dtype = getattr(torch, parts.config.dtype) if parts.config.dtype else None
    copied = load_base(folder / "base", dtype=dtype)
    return replace(
        parts.config, base_source=BASE_COPY, base_sha256=copied.sha256, base_revision=None, base_gguf_file=None
    )


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, str(file))


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); restore the policy folder or save it again") from error


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
