"""`prefmix train recipe.yaml --num_experts 4`: checks everything that is cheap, then trains."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefmix.cli.output import add_format, print_json, print_pairs, stdout_is_for_results
from prefmix.cli.recipe import load_recipe
from prefmix.cli.train_help import HelpAction, add_field_flags, overrides

REQUIRED = ("model", "train_data", "output_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb: the recipe, and every field of it."""
    parser.usage = "prefmix train [recipe.yaml] [--dry_run] [--format text|json] [--FIELD VALUE ...]"
    parser.add_argument("-h", "--help", action=HelpAction, nargs="?", help="these fields; --help all: every field")
    parser.add_argument("recipe", nargs="?", help="a recipe (write one with: prefmix init)")
    parser.add_argument("--config", help="the same, TRL's way")
    parser.add_argument("--dry_run", action="store_true", help="check recipe, data and model, print the plan, stop")
    add_format(parser)
    add_field_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Checks, then trains, saves and prints what was learned."""
    if args.recipe and args.config:
        raise ValueError("two recipes were given; write the path once, as an argument or after --config")
    path = args.recipe or args.config
    recipe = load_recipe(Path(path) if path else None, overrides(args), REQUIRED)
    from prefmix.cli.plan import make_plan

    plan = make_plan(recipe)
    if args.dry_run:
        print_json(plan) if args.format == "json" else print_pairs(plan, title="nothing is wrong; this would run")
        return
    with stdout_is_for_results():
        summary = train(recipe)
    print_json(summary) if args.format == "json" else print_pairs(summary, title=f"trained: {summary['policy']}")
