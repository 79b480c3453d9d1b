"""What a run would do, and what stands in its way, found before a model or torch is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefmix.cli.fields import all_fields
from prefmix.cli.model_check import check_model
from prefmix.cli.recipe import Recipe
from prefmix.data.validation import ValidationReport, validate

_SHOWN = ("num_experts", "head", "expert_rank", "beta", "gate", "estep", "learning_rate", "num_train_epochs", "seed")


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """Checks data, model and output folder of a checked recipe.

    Returns:
        What would run, in the order in which it is printed: data, model, the choices that "auto" stands for, sizes.

    Raises:
        ValueError: naming the file, row or field and the remedy.
    """
    values = recipe.values
    train = validate(values["train_data"], split=values.get("train_split"))
    plan: dict[str, Any] = {"train_data": _describe(values["train_data"], train)}
    if values.get("eval_data") is not None:
        held_out = validate(values["eval_data"], split=values.get("eval_split"))
        plan["eval_data"] = _describe(values["eval_data"], held_out)
    plan["model"] = check_model(
        values["model"], revision=values.get("model_revision"), trust_remote_code=values.get("trust_remote_code", False)
    )
    _check_output(Path(values["output_dir"]))
    plan["output_dir"] = values["output_dir"]
    plan["latent"] = _latent(values.get("latent", "auto"), train)
    plan |= {name: values.get(name, all_fields()[name].default) for name in _SHOWN}
    return plan


def _describe(source: str, report: ValidationReport) -> str:
    facts = report.to_dict()
    text = f"{source}: {facts['rows']} rows, {facts['users']} users"
    dropped = sum(facts.get("dropped", {}).values())
    return text + (f", {dropped} dropped (ties and rows of weight 0)" if dropped else "")


def _latent(latent: str, report: ValidationReport) -> str:
    """The rule of `latent="auto"`: a user carries one expert where user ids repeat."""
    if latent != "auto":
        return latent
    return "user (user ids repeat)" if report.users and report.rows > report.users else "pair (no repeated user ids)"


def _check_output(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"output_dir={str(folder)!r} is a file; name a folder")
