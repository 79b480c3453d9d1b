"""The fields that `MixtureConfig` adds to `transformers.TrainingArguments`, and what must hold between them.

Nothing here imports torch: a configuration is checked before anything heavy is loaded. A field is documented once,
in its `help`; `--help` and the docs are made from it. Names and defaults are TRL's where TRL has the field.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from prefmix.training.expert_options import QuantizationOptions, ReadingOptions, expert_problems
from prefmix.training.likelihood_options import LikelihoodOptions, likelihood_problems
from prefmix.training.membership_options import MembershipOptions, membership_problems
from prefmix.training.registered_names import PROMPT_TERMS, choices

Latent = Literal["auto", "pair", "user", "membership"]
GateTerm = Literal["global", "prompt", "user", "metadata"]
Head = Literal["auto", "hidden", "logit", "full", "none"]
Trunk = Literal["frozen", "lora", "full"]
MStepName = Literal["all", "sampled", "top"]
EStepName = Literal["exact", "hard", "annealed", "gumbel", "amortized"]
Initialization = Literal["auto", "probe", "random", "kmeans", "labels", "experts"]


def _field(default, help_text: str):  # type: ignore[no-untyped-def]
    metadata = {"help": help_text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class MixtureOptions(ReadingOptions, QuantizationOptions, MembershipOptions, LikelihoodOptions):
    """What is specific to mixtures of expert policies (method.md has the symbols)."""

    # --- model -------------------------------------------------------------------------------------------------------
    num_experts: int = _field(4, "K, the number of experts. 1 is plain DPO.")
    branch_depth: int = _field(
        0, "n: each expert has its own LoRA in the last n blocks; 0: only output heads differ; -1: LoRA in all blocks."
    )
    head: Head = _field(
        "auto",
        "Output head of an expert: low-rank in hidden space, low-rank in logit space, full, or none of its own; auto: "
        "hidden at branch_depth 0, else none (LoRA moves the states already, and servers load no adapter on lm_head).",
    )
    expert_rank: int = _field(16, "Rank r of every LoRA and of a low-rank head.")
    lora_alpha: float | None = _field(
        None, "LoRA is scaled by lora_alpha / expert_rank; null: twice the rank, as TRL's 32 for 16."
    )
    trunk: Trunk = _field(
        "frozen",
        "What trains below the experts, for all of them: nothing, one LoRA, or the blocks themselves. The reference "
        "stays the base model.",
    )
    trunk_learning_rate: float | None = _field(None, "Learning rate of a trained trunk; null: learning_rate.")
    # --- where experts come from, and which of them train -------------------------------------------------------------
    expert_kind: Literal["shared_base", "independent"] = _field(
        "shared_base", "Experts that grow from one frozen base, or K whole models, each trained in full."
    )
    expert_models: list[str] = _field(
        [], "independent: folders or hub names, one each or one for all; empty: copies of the base model."
    )
    reference: Literal["per_expert", "shared"] = _field(
        "per_expert",
        "independent: each expert is measured against a frozen copy of its start, so that every margin starts at 0, or "
        "all against the base model.",
    )
    expert_devices: list[str] = _field([], "independent: a device for each expert (cuda:0, cpu); empty: one for all.")
    expert_parallel: bool = _field(
        False, "independent: expert k lives on process k mod W, and all W processes read the same rows (W <= K)."
    )
    init_experts: list[str] = _field(
        [], "Experts to start from: a policy folder, or PEFT adapters over the base, one each or one for all."
    )
    freeze_experts: list[int] = _field([], "Experts, counted from 0, that stay bit for bit as they start.")
    train_experts: bool = _field(True, "false: all experts stay as they start and the gate alone learns.")
    # --- likelihood (TRL's names) -------------------------------------------------------------------------------------
    beta: float | list[float] = _field(0.1, "beta_k of the implicit reward; one number, or one for each expert.")
    label_noise: float = _field(
        0.0, "e in p = (1-e) sigmoid(m) + e sigmoid(-m): share of flipped labels, 0 <= e < 0.5."
    )
    # --- latent and gate ----------------------------------------------------------------------------------------------
    latent: Latent = _field(
        "auto",
        "What carries one expert: a comparison (pair) or a user; membership: users blend experts; auto: user where ids "
        "repeat.",
    )
    gate: list[GateTerm] = _field(["global"], "Terms of the gate, summed in logit space.")
    gate_update: Literal["closed_form", "gradient", "fixed"] = _field(
        "closed_form", "How a purely global gate moves: EM's closed form, gradient steps, or not at all (uniform)."
    )
    gate_prior_alpha: float = _field(1.0, "Dirichlet concentration of the mixture weights, at least 1 (1 is flat).")
    metadata_prior: Literal["relevance", "flat"] = _field(
        "relevance",
        "Of the metadata term's last fit: each field a width that the evidence chooses, none if it says nothing; flat: "
        "as gradient steps leave it, noise included.",
    )
    gate_learning_rate: float = _field(1e-2, "Learning rate of gate terms that learn by gradient.")
    # --- E-step -------------------------------------------------------------------------------------------------------
    estep: EStepName = _field(
        "exact",
        "How responsibilities are computed; amortized: by a network, trained along (looser, and the gap is logged).",
    )
    estep_temperature: float = _field(1.0, "Temperature at the start (annealed, gumbel).")
    estep_temperature_end: float = _field(1.0, "Temperature at the end of training (annealed, gumbel).")
    gumbel_hard: bool = _field(True, "Straight-through one-hot samples; false: relaxed samples.")
    # --- M-step -------------------------------------------------------------------------------------------------------
    m_step: MStepName = _field(
        "all",
        "Which experts learn from a row: all; sampled: those drawn from its responsibilities (unbiased, cheaper); top: "
        "the largest and those above m_step_threshold (biased: an expert never learns from rows it explains badly).",
    )
    m_step_samples: int = _field(1, "Experts drawn for each row (sampled); more draws, less noise, more cost.")
    m_step_threshold: float = _field(
        0.1, "Responsibility from which an expert learns (top), 0 to 1; the row's largest always does."
    )
    # --- initialization -----------------------------------------------------------------------------------------------
    init: Initialization = _field("auto", "First responsibilities; auto: probe with users, else k-means over prompts.")
    warm_start_epochs: float = _field(
        0.0, "Epochs at the start in which every expert learns from every row: what all people share, before they part."
    )
    init_hold_epochs: float = _field(1.0, "Epochs after that during which the first responsibilities are held.")
    probe_restarts: int = _field(8, "Random starts of the probe; the best penalised evidence is kept.")
    probe_dim: int = _field(64, "Principal directions of the pooled trunk states that the probe sees.")
    # --- regularization -----------------------------------------------------------------------------------------------
    token_dropout: float = _field(
        0.0, "Share of completion tokens that a training step leaves out. 0.5 keeps heads from memorising few texts."
    )
    pooling: float | None = _field(
        None,
        "Draws experts to what all share: this times a row's variance of margins over experts (nats^2) is added to its "
        "loss. null: where the probe starts them, as strong as the prior that held-out users chose for the probe, else "
        "0. 0: none; large: one model K times. For users of few comparisons, whose experts differ less than noise.",
    )
    # --- data ---------------------------------------------------------------------------------------------------------
    max_length: int | None = _field(1024, "Longest prompt plus completion in tokens (TRL's default).")
    truncation_mode: Literal["keep_start", "keep_end"] = _field("keep_start", "Which end of a long row stays.")
    group_texts: bool | None = _field(
        None, "Batch comparisons that share a prompt, so that a text is read once; null: where texts repeat often."
    )
    # --- trunk states -------------------------------------------------------------------------------------------------
    cache_states: Literal["auto", "disk", "memory", "off"] = _field(
        "auto", "Where states of the frozen trunk are kept."
    )
    cache_dir: str | None = _field(None, "Folder of cached trunk states; null: the user's cache folder.")
    # --- base model ---------------------------------------------------------------------------------------------------
    model_revision: str | None = _field(None, "Revision of the base model on the hub (TRL's name).")
    trust_remote_code: bool = _field(
        False, "Run code that comes with the base model. Off: read it before you trust it."
    )
    # --- run ----------------------------------------------------------------------------------------------------------
    sharding: Literal["none", "fsdp2"] = _field(
        "none", "Several processes: each holds the whole model, or (fsdp2) its share of all parameters and moments."
    )
    num_processes: int | None = _field(
        None, "Processes that this run must have; another number stops it (accelerate may start one in silence)."
    )
    overwrite_output_dir: bool = _field(False, "Start anew in a folder that holds a finished run (it is replaced).")


@dataclass
class RunOptions:
    """Fields of `transformers.TrainingArguments` whose default we change, each with its reason."""

    learning_rate: float | None = _field(
        None,
        "Step size of the experts; null: 1e-3 for heads, which start at zero, 2e-4 with LoRA in blocks or a trained "
        "trunk, 1e-6 (TRL's) for whole models.",
    )
    per_device_train_batch_size: int = _field(8, "Comparisons (not texts) of one forward pass on one device.")
    train_sampling_strategy: Literal["random", "group_by_length"] | None = _field(
        None,
        "Order of comparisons (transformers' name): random, or batches of like length, which pad less; null: the "
        "latter where experts read token ids. Batches are shuffled either way, and seed and epoch alone decide.",
    )
    logging_steps: float = _field(10, "Optimizer steps between two lines of the log (TRL's default).")
    gradient_checkpointing: bool = _field(
        False,
        "TRL: true. A frozen trunk keeps no activations; for whole models true saves memory and costs a third; with "
        "branches it keeps one expert's at a time, with a trained trunk one block's.",
    )
    bf16: bool | None = _field(
        None, "Trunk in bfloat16. TRL: always; here null means on a GPU only, because float32 on a CPU is exact."
    )
    remove_unused_columns: bool = _field(False, "The collator reads a table of comparisons and drops nothing.")
    average_tokens_across_devices: bool = _field(False, "The loss is divided by row weights, which we sum ourselves.")
    save_strategy: str = _field("epoch", "A checkpoint an epoch: heads are small and the trunk is not saved.")
    save_total_limit: int | None = _field(2, "The last checkpoint and the one to fall back to if it is damaged.")
    report_to: str | list[str] | None = _field("none", "Trackers. A local metrics.jsonl is always written.")
    logging_nan_inf_filter: bool = _field(
        False, "The filter hides NaN and syncs every micro-step; here NaN stops the run."
    )
    restore_callback_states_from_checkpoint: bool = _field(
        True, "A resumed run counts early stopping on from where it was, as the uninterrupted run does."
    )


OPTION_NAMES = tuple(MixtureOptions.__dataclass_fields__)

# Fields of TrainingArguments that would be read by nothing here, or do something else than their name says.
_UNSUPPORTED = {
    "label_smoothing_factor": "smooths token labels; for preferences that are wrong now and then use label_noise",
    "save_only_model": "a checkpoint without optimizer cannot be resumed; the policy folder is the model alone",
    "push_to_hub": "upload the finished folder output_dir/policy with `hf upload`",
    "auto_find_batch_size": "it restarts within a run, which could not be resumed exactly; set the batch size",
}


def validate_options(options: Mapping[str, Any]) -> None:
    """Checks every field of `MixtureOptions` and `RunOptions` that `options` names, and what must hold between them.

    Fields that are absent count as their defaults; fields of neither class are not looked at.

    Raises:
        ValueError: all problems at once, one a line, each with field, value and remedy.
    """
    values = {name: options.get(name, getattr(MixtureOptions(), name)) for name in OPTION_NAMES}
    values |= {name: value for name, value in options.items() if name not in values}
    problems = _type_problems(values)
    if not problems:
        problems = [*_range_problems(values), *_combination_problems(values)]
    if problems:
        raise ValueError("\n".join(problems))


def gate_problems(terms: Iterable[str], latent: str) -> list[str]:
    """Why gate terms and a latent do not go together (method.md section 2), or nothing.

    A `user` latent has one expert a user, so its gate must be constant within a user: with the prompt it would not be,
    and a free weight vector per user would become one-hot and count the user's rows twice.
    """
    terms = list(terms)
    faults = {"user": "one-hot weights that count a user's rows twice"}
    faults |= dict.fromkeys(PROMPT_TERMS, "a prior that changes within a user")
    problems = []
    if not terms:
        problems.append("gate=[]: name at least one term, for example gate=[global]")
    if len(set(terms)) < len(terms):
        problems.append(f"gate={terms}: a term stands twice; name each once")
    for term, fault in faults.items():
        if latent == "user" and term in terms:
            problems.append(
                f"gate={terms} with latent='user': {term!r} gives {fault}; use latent='pair' or drop the term"
            )
    return problems


def expert_head(head: str, branch_depth: int) -> str:
    """What `head="auto"` stands for."""
    if head != "auto":
        return head
    return "hidden" if branch_depth == 0 else "none"


def reads_states(branch_depth: int, trunk: str) -> bool:
    """Whether cached states of the frozen trunk are all that the experts read."""
    return branch_depth == 0 and trunk == "frozen"


def branch_problems(values: Mapping[str, Any]) -> list[str]:
    """Why branch depth, head, trunk, cache and precision do not go together, or nothing."""
    depth, trunk = values["branch_depth"], values["trunk"]
    head = expert_head(values["head"], depth)
    problems = []
    if depth == 0 and head == "none":
        problems.append("head='none' with branch_depth=0: nothing would tell experts apart; choose a head or a depth")
    if depth != 0 and head == "full":
        problems.append(
            f"head='full' with branch_depth={depth}: use head='none', 'hidden' or 'logit', or branch_depth=0"
        )
    if depth == -1 and trunk != "frozen":
        problems.append(f"trunk={trunk!r} with branch_depth=-1: no block is left below the experts; use trunk='frozen'")
    if not reads_states(depth, trunk) and values["cache_states"] in ("disk", "memory"):
        problems.append(
            f"cache_states={values['cache_states']!r} with branch_depth={depth}, trunk={trunk!r}: the experts read "
            "more than the trunk's last states; use cache_states='auto' or 'off'"
        )
    if trunk == "full" and values.get("bf16"):
        problems.append("bf16=true with trunk='full': bfloat16 rounds small steps away; use trunk='lora' or bf16=false")
    return problems


def _type_problems(values: Mapping[str, Any]) -> list[str]:
    hints = get_type_hints(RunOptions) | get_type_hints(MixtureOptions)
    return [
        f"{name}={value!r}: expected {_expected(hints[name])}{_value_suggestion(value, hints[name])}"
        for name, value in values.items()
        if name in hints and not _fits(value, hints[name])
    ]


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in choices(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _expected(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in choices(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(part) for part in get_args(hint))
    if origin is list:
        return f"a list of {_expected(get_args(hint)[0])}"
    return {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}[hint]


def _value_suggestion(value: Any, hint: Any) -> str:
    known = [choice for part in (hint, *get_args(hint)) if get_origin(part) is Literal for choice in choices(part)]
    return _suggestion(value, known) if isinstance(value, str) else ""


def _suggestion(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _range_problems(values: Mapping[str, Any]) -> list[str]:
    betas = values["beta"] if isinstance(values["beta"], list | tuple) else [values["beta"]]
    checks = (
        ("num_experts", values["num_experts"] >= 1, "at least 1; 1 is plain DPO"),
        ("branch_depth", values["branch_depth"] >= -1, "a number of blocks, 0 (heads only) or -1 (all blocks)"),
        ("expert_rank", values["expert_rank"] >= 1, "at least 1"),
        ("lora_alpha", values["lora_alpha"] is None or 0 < values["lora_alpha"] < float("inf"), "positive, or null"),
        ("trunk_learning_rate", values["trunk_learning_rate"] is None or values["trunk_learning_rate"] > 0, "positive"),
        ("beta", all(0 < beta < float("inf") for beta in betas), "every beta is positive and finite, for example 0.1"),
        ("label_noise", 0 <= values["label_noise"] < 0.5, "at least 0 and below 0.5; at 0.5 labels say nothing"),
        ("gate_prior_alpha", 1 <= values["gate_prior_alpha"] < float("inf"), "at least 1; below 1 weights go to zero"),
        ("gate_learning_rate", values["gate_learning_rate"] > 0, "positive; gate_update=fixed stops a global gate"),
        ("estep_temperature", values["estep_temperature"] > 0, "positive"),
        ("estep_temperature_end", values["estep_temperature_end"] > 0, "positive; 1 ends at the exact posterior"),
        ("m_step_samples", values["m_step_samples"] >= 1, "at least 1 draw"),
        ("m_step_threshold", 0 <= values["m_step_threshold"] <= 1, "from 0 (all experts) to 1 (one expert a row)"),
        ("num_processes", values["num_processes"] is None or values["num_processes"] >= 1, "at least 1, or null"),
        ("warm_start_epochs", values["warm_start_epochs"] >= 0, "zero or more epochs"),
        ("init_hold_epochs", values["init_hold_epochs"] >= 0, "zero or more epochs"),
        ("probe_restarts", values["probe_restarts"] >= 1, "at least 1"),
        ("probe_dim", values["probe_dim"] >= 1, "at least 1"),
        ("pooling", 0 <= (values["pooling"] or 0) < float("inf"), "zero or more; 0 leaves experts independent"),
        ("token_dropout", 0 <= values["token_dropout"] < 1, "at least 0 and below 1; 0 reads every token"),
        ("max_length", values["max_length"] is None or values["max_length"] >= 2, "at least 2 tokens, or null"),
    )  # fmt: skip
    problems = [f"{name}={values[name]!r}: {remedy}" for name, holds, remedy in checks if not holds]
    positive = (
        "learning_rate",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    )
    for name in positive:
        value = values.get(name)
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            problems.append(f"{name}={value!r}: must be positive")
    return problems


def _combination_problems(values: Mapping[str, Any]) -> list[str]:
    beta, gate, estep = values["beta"], list(values["gate"]), values["estep"]
    problems = [*gate_problems(gate, values["latent"]), *branch_problems(values), *expert_problems(values)]
    problems += membership_problems(values) + likelihood_problems(values)
    if isinstance(beta, list | tuple) and len(beta) != values["num_experts"]:
        problems.append(
            f"beta={beta!r}: {len(beta)} values for num_experts={values['num_experts']}; give one each, or one"
        )
    if gate and gate != ["global"] and values["gate_update"] == "fixed":
        problems.append(
            f"gate_update='fixed' with gate={gate}: only a purely global gate stays fixed; use gate=[global]"
        )
    if values["sharding"] != "none" and (values["expert_kind"] == "independent" or values["freeze_experts"]):
        problems.append("sharding='fsdp2': neither whole models nor frozen experts are sharded; use sharding='none'")
    if values.get("fsdp"):
        problems.append(f"fsdp={values['fsdp']!r}: accelerate would shard a mixture wrongly; use sharding='fsdp2'")
    if values["pooling"] and values["m_step"] != "all":
        problems.append(f"pooling with m_step={values['m_step']!r}: it needs every expert's gradient; use m_step='all'")
    if values["m_step"] != "sampled" and values["m_step_samples"] != 1:
        problems.append(f"m_step_samples with m_step={values['m_step']!r}: no effect there; use m_step='sampled'")
    if values["m_step"] != "top" and values["m_step_threshold"] != 0.1:
        problems.append(f"m_step_threshold with m_step={values['m_step']!r}: no effect there; use m_step='top'")
    if estep in ("exact", "amortized") and (values["estep_temperature"], values["estep_temperature_end"]) != (1.0, 1.0):
        problems.append(
            f"estep_temperature with estep={estep!r}: no effect there; use estep='annealed' or leave it at 1"
        )
    for name, remedy in _UNSUPPORTED.items():
        if values.get(name):
            problems.append(f"{name}={values[name]!r}: {remedy}")
    return problems
