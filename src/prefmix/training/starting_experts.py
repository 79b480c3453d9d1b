"""Experts as a run begins: untrained, from a policy or adapters, or whole models; and those that stay frozen.

Legend: K experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefmix.experts.adapter_files import adapter_state, is_adapter
from prefmix.experts.base_model import BaseModel, load_base
from prefmix.experts.build import build_experts
from prefmix.experts.independent import IndependentExperts
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.recombine import with_states
from prefmix.experts.spread_experts import SpreadExperts, experts_of_process
from prefmix.policy.config import PolicyConfig
from prefmix.policy.expert_files import read_experts
from prefmix.policy.folder import CONFIG_FILE, damaged_files, find_policy
from prefmix.training.config import MixtureConfig
from prefmix.training.expert_options import check_number_of_experts


def starting_experts(
    base: BaseModel, args: MixtureConfig, description: Mapping[str, Any], generator: torch.Generator
) -> AbstractExperts:
    """The experts that a configuration asks for, at their start.

    Args:
        base: the base model, with its tokenizer.
        args: the configuration.
        description: of experts over a shared base (`setup.expert_description`).
        generator: of their random part.

    Raises:
        ValueError: a policy, adapter or model that does not fit.
    """
    if args.expert_kind == "independent":
        return _independent(base, args)
    experts = build_experts(base.model, description, generator)
    return _started(experts, base, args) if args.init_experts else experts


class FrozenExperts:
    """Keeps some experts bit for bit as they are while the others train.

    They get no gradient; what an optimizer does without one (weight decay) is undone after each step.
    """

    def __init__(self, experts: AbstractExperts, frozen: Sequence[int], train_experts: bool) -> None:
        """Freezes the experts `frozen`, or all that experts are made of where `train_experts` is false."""
        self._experts = experts
        self._states: dict[int, dict[str, Tensor]] = {}
        if not train_experts:
            experts.requires_grad_(False)
        elif frozen:
            experts.freeze_experts(frozen)
            # Whole models are not in the optimizer at all.
            if not isinstance(experts, IndependentExperts | SpreadExperts):
                self._states = {expert: experts.expert_state(expert) for expert in frozen}

    def restore(self) -> None:
        """Puts the frozen experts back; called after each step of the optimizer."""
        for expert, state in self._states.items():
            self._experts.load_expert_state(expert, state)


def _independent(base: BaseModel, args: MixtureConfig) -> IndependentExperts | SpreadExperts:
    if not args.expert_parallel:
        return _whole_models(base, args, range(args.num_experts))
    own = experts_of_process(args.num_experts, args.world_size, args.process_index)
    return SpreadExperts(_whole_models(base, args, own), args.num_experts, args.world_size, args.process_index)


def _whole_models(base: BaseModel, args: MixtureConfig, experts: Sequence[int]) -> IndependentExperts:
    """Some of the experts that the configuration names, and nothing of the others."""
    sources: list[str | None] = [*args.expert_models] or [None]
    sources = sources * args.num_experts if len(sources) == 1 else sources
    sources = [sources[expert] for expert in experts]
    starts: dict[str | None, BaseModel] = {None: base}
    for source in sources:
        if source not in starts:
            assert source is not None
            starts[source] = load_base(source, dtype=torch.float32, trust_remote_code=args.trust_remote_code)
            _check_tokenizer(base, starts[source], str(source))
    models = [copy.deepcopy(starts[source].model).requires_grad_(True) for source in sources]
    references = None
    if args.reference == "per_expert":
        chosen = [starts[source] for source in sources]
        references = [None if start.sha256 == base.sha256 else start for start in chosen]
    return IndependentExperts(
        models,
        base.model,
        references,
        devices=args.expert_devices or None,
        autocast=torch.bfloat16 if args.bf16 else None,
    )


def _check_tokenizer(base: BaseModel, other: BaseModel, source: str) -> None:
    assert base.tokenizer is not None and other.tokenizer is not None
    if base.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ValueError(
            f"expert_models: {source} has another tokenizer than the base model; experts of any size mix, but only "
            "over one vocabulary"
        )


def come_apart(args: MixtureConfig) -> bool:
    """Whether experts start trained and different, so that rows tell them apart: not one adapter for all."""
    sources = args.init_experts
    return len(set(sources)) > 1 or (len(sources) == 1 and (args.num_experts == 1 or not is_adapter(sources[0])))


def _started(experts: AbstractExperts, base: BaseModel, args: MixtureConfig) -> AbstractExperts:
    sources = args.init_experts
    if (args.init == "experts" or not args.train_experts) and not come_apart(args):
        field = "init='experts'" if args.train_experts else "train_experts=false"
        raise ValueError(
            f"{field} with init_experts={list(sources)}: {args.num_experts} experts that start from one adapter are "
            "equal, and no row can tell them apart; name an adapter each, or a policy"
        )
    if len(sources) == 1 and not is_adapter(sources[0]):
        return _from_policy(experts, base, sources[0])
    for source in sources:
        if (Path(source) / CONFIG_FILE).is_file():
            raise ValueError(
                f"init_experts: {source} is a policy among {len(sources)} names; name one policy alone, or adapters "
                f"(its experts are {source}/expert_0, expert_1 ...)"
            )
    sources = list(sources) * (experts.num_experts if len(sources) == 1 else 1)
    return with_states(experts, [adapter_state(experts, source) for source in sources])


def _from_policy(experts: AbstractExperts, base: BaseModel, source: str) -> AbstractExperts:
    folder = find_policy(source)
    problems = damaged_files(folder)
    if problems:
        raise ValueError(f"init_experts={source!r}: damaged policy: {'; '.join(problems)}; restore these files")
    config = PolicyConfig.from_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config.base_sha256 != base.sha256:
        raise ValueError(
            f"init_experts={source!r}: its experts belong to base {config.base_source} ({config.base_sha256[:12]}...), "
            f"not to {base.source} ({base.sha256[:12]}...); train on that base, in the same precision"
        )
    ours, theirs = experts.describe(), dict(config.experts)
    check_number_of_experts(source, theirs["num_experts"], experts.num_experts)
    differing = [name for name in ours.keys() - {"rank", "lora_alpha"} if ours[name] != theirs.get(name)]
    if differing:
        fields = ", ".join(f"{name}={theirs.get(name)!r} (not {ours[name]!r})" for name in sorted(differing))
        raise ValueError(f"init_experts={source!r}: its experts have {fields}; set these options so")
    loaded = read_experts(folder, config, base.model)
    experts.load_shared_state(loaded.shared_state())
    return with_states(loaded, [loaded.expert_state(k) for k in range(loaded.num_experts)])
