"""What a run would do, and what stands in its way, found before a model or torch is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefmix.cli.fields import all_fields
from prefmix.cli.model_check import check_model
from prefmix.cli.recipe import Recipe
from prefmix.data.counted import counted
from prefmix.data.validation import ValidationReport, validate
from prefmix.policy.folder import CONFIG_FILE, find_policy
from prefmix.training.expert_options import check_number_of_experts, default_learning_rate
from prefmix.training.options import MixtureOptions, gate_problems

_SHOWN = (
    "expert_kind",
    "num_experts",
    "branch_depth",
    "head",
    "expert_rank",
    "trunk",
    "beta",
    "gate",
    "estep",
    "learning_rate",
    "num_train_epochs",
    "seed",
)


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """Checks data, model and output folder of a checked recipe.

    Returns:
        What would run, in the order in which it is printed: data, model, the choices that "auto" stands for, sizes.

    Raises:
        ValueError: naming the file, row or field and the remedy.
    """
    values = recipe.values
    train = validate(values["train_data"], values.get("train_split"), values.get("user_column"))
    plan: dict[str, Any] = {"train_data": _describe(values["train_data"], train)}
    if values.get("eval_data") is not None:
        held_out = validate(values["eval_data"], values.get("eval_split"), values.get("user_column"))
        plan["eval_data"] = _describe(values["eval_data"], held_out)
    plan["model"] = check_model(
        values["model"], revision=values.get("model_revision"), trust_remote_code=values.get("trust_remote_code", False)
    )
    _check_gate(values, train)
    _check_start(values)
    _check_output(Path(values["output_dir"]), values)
    plan["output_dir"] = values["output_dir"]
    plan["latent"] = _latent(values, train)
    if (warning := identity_warning(train)) is not None and (train.unread_users or values.get("num_experts") != 1):
        plan["note"] = warning
    plan |= {name: values.get(name, all_fields()[name].default) for name in _SHOWN}
    plan |= {name: values[name] for name in ("init_experts", "train_experts", "freeze_experts") if name in values}
    if plan["learning_rate"] is None:
        plan["learning_rate"] = default_learning_rate(asdict(MixtureOptions()) | values)
    return plan


def _describe(source: str, report: ValidationReport) -> str:
    sizes = {"row": report.rows, "user": report.users, "text": report.texts, "prompt": report.prompts}
    text = f"{source}: {', '.join(counted(number, noun) for noun, number in sizes.items())}"
    dropped = ", ".join(f"{count} left out ({reason})" for reason, count in report.dropped.items())
    return f"{text}, {dropped}" if dropped else text


def _latent(values: dict[str, Any], report: ValidationReport) -> str:
    """What `latent="auto"` will be (`training.setup.resolve_latent`), and why."""
    if values.get("latent", "auto") != "auto":
        return values["latent"]
    if 2 * (report.users - report.users_with_one_row) <= report.users:
        return "pair (most users have a single row)" if report.users else "pair (the rows name no users)"
    if gate_problems(values.get("gate", ["global"]), "user"):
        return "pair (the gate changes within a user)"
    return f"user (half of the users have {report.rows_per_user_median:g} rows or more)"


def _check_gate(values: dict[str, Any], report: ValidationReport) -> None:
    if "metadata" not in values.get("gate", ["global"]):
        return
    per_comparison = not _latent(values, report).startswith("user")
    if not any(per_comparison or name.startswith("user_") for name in report.metadata_fields):
        raise ValueError(
            f"gate={values['gate']}: the term 'metadata' needs fields in the column 'metadata' ('user_*' ones where "
            f"users carry the experts), and {values['train_data']} has none{_renamed(report)}; add them, or leave the "
            "term out"
        )


def _renamed(report: ValidationReport) -> str:
    """What the rows have instead, where it may be a matter of names."""
    if report.metadata_fields:
        names = list(report.metadata_fields)
        return f" (it has {', '.join(names)}: call what is constant within a user user_{names[0]} and so on)"
    outside = [name for name in report.extra_columns if name.startswith("user_")]
    return f" (the columns {', '.join(outside)} stand beside it: move them in)" if outside else ""


def _check_start(values: dict[str, Any]) -> None:
    """That a policy to start from is there, and has as many experts; adapters are read when training starts."""
    sources = values.get("init_experts") or []
    if len(sources) != 1 or (Path(sources[0]) / "adapter_config.json").is_file():
        return
    config = json.loads((find_policy(sources[0]) / CONFIG_FILE).read_text(encoding="utf-8"))
    ours = values.get("num_experts", MixtureOptions.num_experts)
    check_number_of_experts(sources[0], config["experts"]["num_experts"], ours)


def identity_warning(report: ValidationReport) -> str | None:
    """What to say where no user repeats, so that only the prompt or metadata could tell groups apart."""
    if report.users > report.users_with_one_row:
        return None
    if report.unread_users is not None:
        return report.unread_users
    return (
        "no user has two rows: groups of people who disagree cannot be told apart from these rows alone. Add a `user` "
        "column, or expect experts by prompt or metadata only (the run says before training what it finds)"
    )


def _check_output(folder: Path, values: dict[str, Any]) -> None:
    if folder.is_file():
        raise ValueError(f"output_dir={str(folder)!r} is a file; name a folder")
    old = [*folder.glob("checkpoint-*"), *folder.glob("finished.json"), *folder.glob("policy")]
    if old and not values.get("overwrite_output_dir") and not values.get("resume_from_checkpoint"):
        raise ValueError(
            f"output_dir={str(folder)!r} holds a run ({old[0].name}); go on with it: --resume_from_checkpoint auto, "
            "replace it: --overwrite_output_dir, or name another folder"
        )
