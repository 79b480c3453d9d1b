"""`prefmix compare compare.yaml`: arms side by side, in one table."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from prefmix.cli.compare_recipe import example_text, load_comparison
from prefmix.cli.model_check import check_model
from prefmix.cli.output import add_format, note, print_json, print_pairs, stdout_is_for_results
from prefmix.data.counted import counted
from prefmix.data.validation import validate
from prefmix.experiments.arms import SETTINGS, all_arms
from prefmix.experiments.compare_settings import CompareSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("config", nargs="?", help="compare.yaml (write one with: prefmix compare --example)")
    parser.add_argument("--output", help="folder of results, instead of the file's output_dir")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--model", help="instead of the file's")
    parser.add_argument("--dry_run", action="store_true", help="check file, data and model, print the plan, stop")
    parser.add_argument("--list", action="store_true", help="name all arms, a line each, and stop")
    parser.add_argument("--example", nargs="?", const="compare.yaml", metavar="PATH", help="write a commented file")
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Lists arms, writes an example, plans, or runs; a run that was stopped goes on."""
    if args.list:
        _list()
        return
    if args.example:
        _write_example(Path(args.example))
        return
    if args.config is None:
        raise ValueError("no file was given; write one with: prefmix compare --example")
    given = {"output_dir": args.output, "seeds": args.seeds, "model": args.model}
    overrides = {name: value for name, value in given.items() if value is not None}
    settings = load_comparison(Path(args.config), overrides)
    plan = _plan(settings)
    if args.dry_run:
        _print_plan(plan, args.format)
        return
    with stdout_is_for_results():
        from prefmix.experiments.comparison_files import write_comparison
        from prefmix.experiments.comparison_run import run_comparison

        cells = run_comparison(settings, say=note)
        text = write_comparison(settings, cells, f"{Path(settings.train_data).name} on {Path(settings.model).name}")
    folder = Path(settings.output_dir)
    print(text) if args.format == "text" else print((folder / "results.json").read_text(encoding="utf-8"))
    note(f"wrote {folder}/results.json, table.md and comparison.svg")


def _list() -> None:
    arms = all_arms()
    print_pairs({name: arm.about + (f" ({arm.source})" if arm.source else "") for name, arm in arms.items()}, "arms:")
    settings = {
        name: f"{what} (default {default})" for method in SETTINGS.values() for name, (default, what) in method.items()
    }
    print_pairs(settings, title="what an arm reads beyond the fields of `prefmix train`:")


def _write_example(path: Path) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(example_text())
    except FileExistsError:
        raise ValueError(f"{path} exists and stays as it is; name another: --example other.yaml") from None
    note(f"wrote {path}; next: prefmix compare {path} --dry_run")


def _print_plan(plan: dict[str, Any], form: str) -> None:
    if form == "json":
        print_json(plan)
        return
    title = "Nothing is wrong. This would run:" if not plan["left_out"] else "This would run, without what is left out:"
    several = {name: "; ".join(plan[name]) for name in ("arms", "left_out") if plan[name]}  # names hold commas
    print_pairs({name: value for name, value in plan.items() if name != "left_out"} | several, title=title)


def _plan(settings: CompareSettings) -> dict[str, Any]:
    """What would run; reads rows, not the model."""
    plan: dict[str, Any] = {}
    for field in fields(CompareSettings):
        if field.name.endswith("_data") and (source := getattr(settings, field.name)) is not None:
            report = validate(source, None, settings.user_column)
            plan[field.name] = (
                f"{source}: {counted(report.rows, 'row')}, {counted(report.users, 'user')}, "
                f"{counted(report.texts, 'text')}"
            )
            if report.unread_users is not None:
                note(f"warning: {source}: {report.unread_users}")
            if field.name == "train_data":
                arms = [arm for arm in settings.arms if report.groups or not arm.needs_groups]
    plan["model"] = check_model(settings.model)
    if not arms:
        raise ValueError("arms: every one needs a `group` in the rows; add others, or rows that name groups")
    cells = len(arms) * len(settings.seeds)
    fits = sum(len(settings.candidates(arm)) + len(settings.seeds) - 1 for arm in arms)
    found = len(list((Path(settings.output_dir) / "cells").glob("*.json")))
    return plan | {
        "output_dir": settings.output_dir + (f" (holds {counted(found, 'finished cell')})" if found else ""),
        "arms": [arm.name for arm in arms],
        "left_out": [f"{arm.name}: the rows name no `group`" for arm in settings.arms if arm not in arms],
        "seeds": settings.seeds,
        "search": settings.search,
        "cells": cells,
        "fits": fits,
    }
