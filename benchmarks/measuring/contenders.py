"""Who takes part: TRL's `DPOTrainer` in several settings, and ours, all with the same rank, rate, beta and schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from measuring.scratch import scratch_folder
from prefmix.experts.base_model import BaseModel
from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

RANK, ALPHA, BETA, LAST_BLOCKS = 16, 32, 0.1, 4
SHARED: dict[str, Any] = {
    "beta": BETA,
    "logging_steps": 1,
    "seed": 0,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "log_level": "error",
}

# Ours. Experts decide responsibilities from the first step (no held start), so that an E-step is part of every step.
OURS: dict[str, dict[str, Any]] = {
    "LoRA, all blocks, K=1": {"num_experts": 1, "branch_depth": -1},
    "LoRA, all blocks, K=1, bf16": {"num_experts": 1, "branch_depth": -1, "bf16": True},
    "full head, K=1": {"num_experts": 1, "head": "full", "learning_rate": 2e-4, "cache_states": "off"},
    "heads, K=1": {"num_experts": 1, "cache_states": "off"},
    "heads, K=8": {"num_experts": 8, "cache_states": "off"},
    "heads, K=16": {"num_experts": 16, "cache_states": "off"},
    "heads, K=8, cached": {"num_experts": 8, "cache_states": "disk"},
    "heads, K=8, bf16": {"num_experts": 8, "cache_states": "off", "bf16": True},
    "heads, K=8, cached, bf16": {"num_experts": 8, "cache_states": "disk", "bf16": True},
    "last four blocks, K=8, all": {"num_experts": 8, "branch_depth": LAST_BLOCKS},
    "last four blocks, K=8, sampled": {"num_experts": 8, "branch_depth": LAST_BLOCKS, "m_step": "sampled"},
}

TRL: dict[str, dict[str, Any]] = {
    "TRL LoRA": {"bf16": False, "gradient_checkpointing": False},
    "TRL LoRA, defaults": {},
    "TRL LoRA, fastest": {"bf16": True, "gradient_checkpointing": False, "precompute_ref_log_probs": True},
    "TRL LoRA, reference precomputed": {
        "bf16": False,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
    },
    "TRL full head": {"bf16": False, "gradient_checkpointing": False},
}


class Variant(NamedTuple):
    """A choice of implementation.

    Attributes:
        fields: of the configuration.
        environment: variables.
    """

    fields: dict[str, Any]
    environment: dict[str, str]


VARIANTS = {
    "prompts once": Variant({"prefix_sharing": True}, {}),
    "prompts twice": Variant({"prefix_sharing": False}, {}),
    "reference known": Variant({"prefix_sharing": True, "precompute_ref_log_probs": True}, {}),
    "pure torch": Variant({}, {"PREFMIX_KERNEL": "chunked"}),
}


class Course(NamedTuple):
    """What one contender trains on.

    Attributes:
        rows: comparisons, in the order in which steps read them (TRL) or to be shuffled into it (ours).
        pairs: comparisons of one step.
        steps: how many steps there are rows for.
        cache_dir: where ours keeps states of the trunk.
        fields: further fields of ours on these rows.
    """

    rows: list[dict[str, Any]]
    pairs: int
    steps: int
    cache_dir: str
    fields: dict[str, Any] = {}


class Bases:
    """The base model in both types, loaded once; all of ours share it, as it is frozen."""

    def __init__(self, load: Callable[[torch.dtype], BaseModel]) -> None:
        self._load = load
        self._loaded: dict[torch.dtype, BaseModel] = {}

    def __getitem__(self, dtype: torch.dtype) -> BaseModel:
        if dtype not in self._loaded:
            self._loaded[dtype] = self._load(dtype)
        return self._loaded[dtype]


def fields_of_ours(name: str) -> dict[str, Any]:
    """Configuration of one of ours; what follows ` | ` in a name chooses an implementation, see `VARIANTS`."""
    kind, _, variant = name.partition(" | ")
    return OURS[kind] | (VARIANTS[variant].fields if variant else {})


def environment_of(name: str) -> dict[str, str]:
    """Environment variables of one of ours."""
    variant = name.partition(" | ")[2]
    return VARIANTS[variant].environment if variant else {}


def our_trainer(name: str, bases: Bases, course: Course) -> MixtureTrainer:
    """One of ours on its rows, untrained."""
    own = course.fields | fields_of_ours(name)
    args = MixtureConfig(
        scratch_folder(),
        **(SHARED | {"init": "random", "init_hold_epochs": 0, "expert_rank": RANK, "lora_alpha": ALPHA} | own),
        max_steps=course.steps,
        per_device_train_batch_size=course.pairs,
        cache_dir=course.cache_dir,
    )
    return MixtureTrainer(bases[args.trunk_dtype], args, train_dataset=course.rows)


def trl_trainer(name: str, bases: Bases, course: Course, *, own_base: bool = False) -> Any:
    """TRL's trainer on the rows in the order given, LoRA on all linear layers or a full head on a frozen trunk.

    Args:
        name: which setting.
        bases: where the model comes from.
        course: rows.
        own_base: LoRA goes into the base itself, not into a copy; for a process in which nobody else reads it.
    """
    import datasets
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    base = bases[torch.float32]
    args = DPOConfig(
        scratch_folder(),
        **(SHARED | TRL[name]),
        learning_rate=2e-4,
        max_steps=course.steps,
        per_device_train_batch_size=course.pairs,
        train_sampling_strategy="sequential",
    )
    lora = None if name == "TRL full head" else LoraConfig(**lora_settings(), task_type="CAUSAL_LM")
    columns = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in course.rows]
    return DPOTrainer(
        model=_with_own_head(base.model) if lora is None else base.model if own_base else _same_weights(base.model),
        ref_model=None if lora else base.model,
        args=args,
        train_dataset=datasets.Dataset.from_list(columns),
        processing_class=base.tokenizer,
        peft_config=lora,
    )


def lora_settings() -> dict[str, Any]:
    """TRL's and ours: rank, scale and layers."""
    return {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}


def _same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own over the same frozen weights: several contenders must fit into one process."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _with_own_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same, in which nothing but an untied output head trains."""
    own = _same_weights(model).requires_grad_(False)
    head = own.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=True)
    own.config.tie_word_embeddings = False
    return own


def trl_configuration(trainer: Any) -> dict[str, Any]:
    """What decides TRL's speed, for the record."""
    args = trainer.args
    names = (
        "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "gradient_checkpointing",
        "precompute_ref_log_probs", "learning_rate", "lr_scheduler_type", "optim", "max_grad_norm", "beta", "loss_type",
        "max_length", "logging_steps", "disable_dropout", "padding_free", "use_liger_kernel",
    )  # fmt: skip
    found = {name: _plain(getattr(args, name)) for name in names if hasattr(args, name)}
    model = trainer.model
    return found | {
        "lora": lora_settings() if hasattr(model, "peft_config") else None,
        "weights": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def our_configuration(name: str, trainer: MixtureTrainer) -> dict[str, Any]:
    """The fields that make this contender, and how much it trains."""
    trained = sum(p.numel() for p in trainer.mixture.parameters() if p.requires_grad)
    batch = trainer.args.per_device_train_batch_size
    return fields_of_ours(name) | {
        "per_device_train_batch_size": batch,
        "learning_rate": trainer.args.learning_rate,
        "trained_parameters": trained,
    }


def copy_adapter_to_trl(ours: MixtureTrainer, model: torch.nn.Module) -> None:
    """Gives TRL's LoRA the values of our only expert."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in ours.mixture.experts.expert_state(0).items():
            parameters[peft_name(name)].copy_(value)


def peft_name(name: str) -> str:
    """PEFT's name in a model for the name that our experts and PEFT's files use."""
    return f"base_model.model.{name.removesuffix('.weight')}.default.weight"


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | bool | list | None) else str(value)
