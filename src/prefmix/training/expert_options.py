"""What must hold between the options that say where experts come from and which of them train. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HEADS_RATE, LORA_RATE, MODELS_RATE = 1e-3, 2e-4, 1e-6


@dataclass
class ReadingOptions:
    """How experts that read token ids read them."""

    prefix_sharing: bool = field(
        default=True,
        metadata={
            "help": "Read what several texts of a batch begin with once: a prompt serves chosen and rejected. Equal up "
            "to rounding, and faster; models whose attention does not allow it read padded rows, as false always does."
        },
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Run the references once over all training texts before the first step, not in every step; null: "
            "where they cost a pass of their own (branch_depth=-1, a trained trunk, whole models) and epochs are many."
        },
    )


@dataclass
class QuantizationOptions:
    """In how many bits the frozen base is held (names of transformers and TRL)."""

    load_in_8bit: bool = field(
        default=False,
        metadata={
            "help": "Hold the base's linear layers, but not its output head, in 8 bits (bitsandbytes). Outliers of a "
            "whole batch decide the arithmetic, so log-probabilities depend a little on a text's neighbours."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "The same in 4 bits (NF4): a quarter of bfloat16's memory, and slower arithmetic."},
    )


def default_learning_rate(values: Mapping[str, Any]) -> float:
    """What `learning_rate: null` stands for.

    Whole models move at TRL's 1e-6. A head that starts at zero needs 1e-3 or more to leave it; LoRA in blocks, which
    acts through all blocks above it, about a tenth of that.
    """
    if values["expert_kind"] == "independent":
        return MODELS_RATE
    return HEADS_RATE if values["branch_depth"] == 0 and values["trunk"] == "frozen" else LORA_RATE


def precomputes_references(values: Mapping[str, Any]) -> bool:
    """What `precompute_ref_log_probs: null` stands for: whether one pass before training saves one an epoch."""
    own_pass = values["expert_kind"] == "independent" or values["branch_depth"] == -1 or values["trunk"] != "frozen"
    several = values["num_train_epochs"] > 1 and values["max_steps"] <= 0
    return own_pass and several and values["token_dropout"] == 0


def reads_experts_once(values: Mapping[str, Any]) -> bool:
    """Whether nothing that trains, and no draw, reaches the experts' log-probabilities: they are constants of the run.

    Left out are experts that only all processes together can run (`expert_parallel`, `sharding`).
    """
    whole = not values["expert_parallel"] and values["sharding"] == "none"
    return not values["train_experts"] and values["token_dropout"] == 0 and whole


def expert_problems(values: Mapping[str, Any]) -> list[str]:
    """Why kind, models, starts and frozen experts do not go together, or nothing."""
    independent = values["expert_kind"] == "independent"
    problems = _independent_problems(values) if independent else _shared_base_problems(values)
    problems += _count_problems(values) + _parallel_problems(values)
    problems += _quantization_problems(values) + _float16_problems(values) + _reference_problems(values)
    models_differ = len(set(values["expert_models"])) > 1 and values["reference"] == "shared"
    # One name may be a policy, whose experts differ, or one adapter for all: `starting_experts` finds out.
    starts_differ = models_differ or len(values["init_experts"]) == 1 or len(set(values["init_experts"])) > 1
    if values["init"] == "experts" and not starts_differ:
        problems.append(
            "init='experts': untrained or equal experts say nothing about rows; name init_experts, or expert_models "
            "with reference='shared', that differ"
        )
    if not values["train_experts"]:
        if not starts_differ:
            problems.append(
                "train_experts=false: the gate alone would choose between equal experts; name init_experts, or "
                "expert_models with reference='shared', that differ"
            )
        if values["gate_update"] == "fixed" and list(values["gate"]) == ["global"]:
            problems.append("train_experts=false with gate_update='fixed': nothing would train; let the gate move")
    return problems


def _independent_problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    defaults = {"branch_depth": 0, "head": "auto", "trunk": "frozen"}
    for name, default in defaults.items():
        if values[name] != default:
            problems.append(f"{name}={values[name]!r} with expert_kind='independent': whole models train; leave it out")
    if values["cache_states"] in ("disk", "memory"):
        problems.append(
            f"cache_states={values['cache_states']!r} with expert_kind='independent': whole models have no frozen "
            "states to cache; use cache_states='auto' or 'off'"
        )
    if values["init_experts"]:
        problems.append(
            "init_experts with expert_kind='independent': whole models start from expert_models (a policy's "
            "expert_0, expert_1 ... are such folders; `prefmix export --format merged` makes one of an adapter)"
        )
    return problems


def _shared_base_problems(values: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{name}={values[name]!r}: only expert_kind='independent' reads it"
        for name, default in (("expert_models", []), ("expert_devices", []), ("reference", "per_expert"))
        if (list(values[name]) if isinstance(default, list) else values[name]) != default
    ]
    if values.get("gradient_checkpointing") and values["branch_depth"] == 0 and values["trunk"] == "frozen":
        problems.append(
            "gradient_checkpointing=true: heads on a frozen trunk keep no activations; whole models "
            "(expert_kind='independent'), LoRA branches (branch_depth) and a trained trunk do; leave it off"
        )
    return problems


def _parallel_problems(values: Mapping[str, Any]) -> list[str]:
    if not values["expert_parallel"]:
        return []
    problems = []
    if values["expert_kind"] != "independent":
        problems.append(
            f"expert_parallel=true with expert_kind={values['expert_kind']!r}: experts over one base are small; "
            "use expert_kind='independent', or plain processes, which share the rows"
        )
    if values["expert_devices"]:
        problems.append("expert_devices with expert_parallel=true: each process has its device; leave them out")
    processes = values["num_processes"]
    if processes is not None and processes > values["num_experts"]:
        problems.append(
            f"expert_parallel=true with num_processes={processes}, num_experts={values['num_experts']}: some processes "
            "would hold no expert; start at most num_experts"
        )
    return problems


def _quantization_problems(values: Mapping[str, Any]) -> list[str]:
    names = [name for name in ("load_in_8bit", "load_in_4bit") if values[name]]
    if not names:
        return []
    problems = ["load_in_8bit=true with load_in_4bit=true: choose one"] if len(names) > 1 else []
    for name, bad, reason in (
        (
            "expert_kind",
            "independent",
            "whole models train and quantised weights cannot; use 'shared_base'",
        ),
        ("trunk", "full", "quantised weights cannot train; use trunk='lora'"),
        ("sharding", "fsdp2", "quantised layers are not sharded; they are small, so use sharding='none'"),
    ):
        if values[name] == bad:
            problems.append(f"{name}={bad!r} with {names[0]}=true: {reason}")
    return problems


def _float16_problems(values: Mapping[str, Any]) -> list[str]:
    if not values.get("fp16"):
        return []
    problems = ["bf16=true with fp16=true: choose one type"] if values.get("bf16") else []
    for name, frozen in (("expert_kind", "shared_base"), ("branch_depth", 0), ("trunk", "frozen")):
        if values[name] != frozen:
            problems.append(
                f"fp16=true with {name}={values[name]!r}: gradients through float16 blocks vanish without loss "
                "scaling, which prefmix does not do; use bf16=true, or float32"
            )
    return problems


def _reference_problems(values: Mapping[str, Any]) -> list[str]:
    if not values["precompute_ref_log_probs"]:
        return []
    problems = []
    if values["token_dropout"] > 0:
        problems.append(
            f"precompute_ref_log_probs=true with token_dropout={values['token_dropout']}: a step reads other tokens "
            "than the precomputed sums; leave one of them out"
        )
    if values["expert_kind"] == "shared_base" and values["branch_depth"] == 0 and values["trunk"] == "frozen":
        problems.append(
            "precompute_ref_log_probs=true with branch_depth=0: the heads' own pass gives the reference for nothing; "
            "leave it out"
        )
    return problems


def _count_problems(values: Mapping[str, Any]) -> list[str]:
    count, problems = values["num_experts"], []
    for name, fitting in (("expert_models", (0, 1, count)), ("init_experts", (0, 1, count))):
        if len(values[name]) not in fitting:
            problems.append(f"{name}: {len(values[name])} names for num_experts={count}; give one each, or one")
    if len(values["expert_devices"]) not in (0, count):
        problems.append(f"expert_devices={list(values['expert_devices'])}: give one each of {count} experts, or none")
    frozen = list(values["freeze_experts"])
    if any(not 0 <= expert < count for expert in frozen) or len(set(frozen)) < len(frozen):
        problems.append(f"freeze_experts={frozen}: name experts 0 to {count - 1}, each once")
    elif frozen and len(frozen) == count:
        problems.append(f"freeze_experts={frozen}: no expert would train; use train_experts=false for the gate alone")
    return problems


def check_number_of_experts(source: str, theirs: int, ours: int) -> None:
    """Raises ValueError where a policy that `init_experts` names has another number of experts than the run."""
    if theirs != ours:
        raise ValueError(
            f"init_experts={source!r}: the policy has {theirs} experts, not num_experts={ours}; set "
            f"num_experts={theirs}, or name its adapters ({source}/expert_0, ...), {ours} of them"
        )
