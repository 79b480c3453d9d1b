"""`prefmix init`: a recipe to start from, every field commented from its help."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from prefmix.cli.fields import FieldDoc, all_fields
from prefmix.cli.output import note

# The fields that a first run should decide; the others stand below them as comments with their defaults.
_CHOSEN: dict[str, Any] = {
    "model": "smollm2",
    "train_data": "train.jsonl",
    "eval_data": None,
    "output_dir": "out",
    "num_experts": 4,
    "num_train_epochs": 3,
    "seed": 42,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("path", nargs="?", default="recipe.yaml", help="where to write it (default recipe.yaml)")
    for name in ("model", "train_data", "eval_data", "output_dir"):
        parser.add_argument(f"--{name}", help=all_fields()[name].help)


def run(args: argparse.Namespace) -> None:
    """Writes the recipe; an existing file is left alone."""
    path = Path(args.path)
    given = {name: getattr(args, name) for name in ("model", "train_data", "eval_data", "output_dir")}
    values = _CHOSEN | {name: value for name, value in given.items() if value is not None}
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(recipe_text(values))
    except FileExistsError:
        raise ValueError(f"{path} exists and stays as it is; name another: prefmix init other.yaml") from None
    note(f"wrote {path}; next: prefmix train {path} --dry_run")


def recipe_text(values: dict[str, Any]) -> str:
    """A recipe with `values` set and every other field of ours as a comment."""
    fields = all_fields()
    lines = [
        "# A recipe for `prefmix train`. Any field can be overridden: prefmix train recipe.yaml --num_experts 2",
        "",
    ]
    for name, value in values.items():
        lines += _entry(fields[name], value, commented=value is None)
    lines += ["", "# --- defaults, each with its meaning; remove the # to change one ---", ""]
    for name, doc in fields.items():
        if name not in values and doc.origin != "trainer":
            lines += _entry(doc, doc.default, commented=True)
    lines += ["# Every field of transformers.TrainingArguments is accepted too: prefmix train --help all", ""]
    return "\n".join(lines)


def _entry(doc: FieldDoc, value: Any, commented: bool) -> list[str]:
    text = doc.help + (f" One of: {', '.join(doc.choices)}." if doc.choices else "")
    mark = "# " if commented else ""
    scalar = value if isinstance(value, str) else json.dumps(value)
    return [*(f"# {line}" for line in textwrap.wrap(text, 110)), f"{mark}{doc.name}: {scalar}", ""]
