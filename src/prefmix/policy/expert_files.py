"""Experts in a policy folder: `expert_k/head.safetensors` over a shared base, or a whole model in `expert_k/`.

A trained trunk, which experts share beside the base, stands in `trunk.safetensors`.

A whole model's folder is what `save_pretrained` writes, tokenizer included, so anyone can load one expert alone. The
frozen references of whole models are found again where they came from, or copied to `reference_k/`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from prefmix.experts.base_model import BaseModel, load_base
from prefmix.experts.build import build_experts
from prefmix.experts.independent import IndependentExperts
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.spread_experts import SpreadExperts
from prefmix.policy.adapters import write_adapter
from prefmix.policy.config import PolicyConfig

STATE_FILE = "head.safetensors"
SHARED_FILE = "trunk.safetensors"


def write_experts(
    experts: AbstractExperts,
    folder: Path,
    config: PolicyConfig,
    tokenizer: PreTrainedTokenizerBase,
    written: Path | None = None,
) -> PolicyConfig:
    """Writes every expert into its folder; returns the config that describes what was written.

    Args:
        experts: K experts, all here unless they are written already.
        folder: of the policy.
        config: describes the experts.
        tokenizer: goes with whole models.
        written: a folder with finished `expert_k` of whole models, which are moved into `folder`; whoever wrote them
            has seen to it that their references can be found again.

    Raises:
        ValueError: the experts live on several processes.
    """
    if written is not None:
        for expert in range(config.num_experts):
            os.rename(written / f"expert_{expert}", folder / f"expert_{expert}")
        return config
    if isinstance(experts, SpreadExperts):
        raise ValueError("expert_parallel: no process holds all experts; save with trainer.save_model()")
    for expert in range(config.num_experts):
        place = folder / f"expert_{expert}"
        place.mkdir()
        if isinstance(experts, IndependentExperts):
            experts.expert_models[expert].save_pretrained(str(place))
            tokenizer.save_pretrained(str(place))
        else:
            save_tensors(experts.expert_state(expert), place / STATE_FILE)
            write_adapter(experts, expert, place, config.base_source)
    shared = experts.shared_state()
    if shared:
        save_tensors(shared, folder / SHARED_FILE)
    if not isinstance(experts, IndependentExperts):
        return config
    return _write_references(experts, folder, config, tokenizer)


def read_experts(folder: Path, config: PolicyConfig, base_model: PreTrainedModel) -> AbstractExperts:
    """The experts that `write_experts` wrote.

    Raises:
        ValueError: damaged files, or a reference that is another model now.
    """
    if config.experts.get("kind") == "independent":
        models = [_load_model(folder / f"expert_{expert}") for expert in range(config.num_experts)]
        references = [_load_reference(folder, config, entry) for entry in config.experts["references"]]
        return IndependentExperts(models, base_model, references)
    experts = build_experts(base_model, config.experts)
    for expert in range(config.num_experts):
        experts.load_expert_state(expert, load_tensors(folder / f"expert_{expert}" / STATE_FILE))
    if experts.shared_state():
        experts.load_shared_state(load_tensors(folder / SHARED_FILE))
    return experts


def can_be_found_again(source: str) -> bool:
    """Whether `source` is a folder, or looks like a name on the hub (owner/name) or a name that `load_base` knows."""
    if not source or source.startswith(("<", "./")):
        return False
    return Path(source).exists() or not Path(source).is_absolute()


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes one safetensors file from tensors on any device."""
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, str(file))


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Reads one safetensors file.

    Raises:
        ValueError: it is missing or cannot be read.
    """
    try:
        return load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); restore the policy folder or save it again") from error


def _write_references(
    experts: IndependentExperts, folder: Path, config: PolicyConfig, tokenizer: PreTrainedTokenizerBase
) -> PolicyConfig:
    written: dict[str, dict[str, Any]] = {}
    for entry in experts.references:
        if entry is None or entry.sha256 in written:
            continue
        source, sha256 = entry.source, entry.sha256
        if not can_be_found_again(source):
            source = f"./reference_{len(written)}"
            entry.model.save_pretrained(str(folder / source))
            tokenizer.save_pretrained(str(folder / source))
            sha256 = load_base(folder / source, dtype=entry.model.dtype).sha256
        elif Path(source).exists():
            source = str(Path(source).absolute())
        written[entry.sha256] = {"source": source, "sha256": sha256}
    references = [None if entry is None else written[entry.sha256] for entry in experts.references]
    return replace(config, experts={**config.experts, "references": references})


def _load_model(place: Path) -> PreTrainedModel:
    try:
        return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(str(place), dtype="auto"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{place}: cannot be loaded ({str(error).splitlines()[0]}); restore the policy") from error


def _load_reference(folder: Path, config: PolicyConfig, entry: dict[str, Any] | None) -> BaseModel | None:
    if entry is None:
        return None
    source = entry["source"]
    place = folder / source if source.startswith("./reference_") else source
    loaded = load_base(place, dtype=getattr(torch, config.dtype) if config.dtype else None)
    if loaded.sha256 != entry["sha256"]:
        raise ValueError(
            f"reference {source}: sha256 {loaded.sha256[:12]}..., but the expert was measured against "
            f"{entry['sha256'][:12]}...; restore that model"
        )
    return loaded._replace(source=source)
