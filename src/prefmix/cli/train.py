"""`prefmix train recipe.yaml --num_experts 4`: checks everything that is cheap, then trains."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from prefmix.cli.fields import RunFields
from prefmix.cli.output import add_format, note, print_json, print_pairs, stdout_is_for_results
from prefmix.cli.recipe import Recipe, load_recipe
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
        print_json(plan) if args.format == "json" else print_pairs(plan, title="Nothing is wrong. This would run:")
        return
    with stdout_is_for_results():
        summary = train(recipe)
    if summary is None:
        return
    if args.format == "json":
        print_json(summary)
    else:
        print_pairs(summary, title=f"Trained. Talk to it: prefmix chat {summary['policy']}")


def train(recipe: Recipe) -> dict[str, Any] | None:
    """Runs a checked recipe.

    Returns:
        Where the policy is and what it learned; None on processes other than the first.
    """
    from prefmix.cli.loading import read_checked_rows
    from prefmix.cli.progress import follow
    from prefmix.training.config import MixtureConfig
    from prefmix.training.trainer import MixtureTrainer

    _talk_on_stderr()
    values = recipe.values
    options = {name: value for name, value in values.items() if name not in RunFields.__dataclass_fields__}
    try:
        config = MixtureConfig(output_dir=values["output_dir"], **_with_evaluation(options, values))
    except ValueError as error:  # transformers' own rules, such as load_best_model_at_end without evaluation
        raise ValueError(str(error)) from error
    held_out, who = values.get("eval_data"), values.get("user_column")
    trainer = MixtureTrainer(
        model=values["model"],
        args=config,
        train_dataset=read_checked_rows(values["train_data"], values.get("train_split"), who, hint=False),
        eval_dataset=None
        if held_out is None
        else read_checked_rows(held_out, values.get("eval_split"), who, hint=False),
    )
    trainer.data_source = values["train_data"]
    follow(trainer)
    trainer.train()
    metrics = {} if held_out is None else trainer.evaluate()
    return _summary(trainer, metrics) if trainer.is_world_process_zero() else None


def _with_evaluation(options: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Held-out rows are there to be looked at: once an epoch, unless the recipe says otherwise."""
    if values.get("eval_data") is not None:
        options.setdefault("eval_strategy", "epoch")
    return options


def _summary(trainer: Any, metrics: dict[str, float]) -> dict[str, Any]:
    users = len(trainer.train_comparisons.table.users)
    learned = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    names = ("accuracy", "population_accuracy", "loss", "population_loss")
    gate = trainer.mixture.gate
    # Of other gates the global term alone is nobody's weights.
    weights = {"gate weights": gate.population_log_weights().exp().tolist()} if gate.is_global else {}
    found = {name: learned[name] for name in names if name in learned}
    return {
        "policy": str(Path(trainer.args.output_dir) / "policy"),
        "steps": trainer.state.global_step,
        "latent": trainer.latent,
        "init": trainer.init,
        "users": users,
        **weights,
        **{f"held-out {name.replace('_', ' ')}": value for name, value in found.items()},
    }


def _talk_on_stderr() -> None:
    """Shows what the trainer chose and warns of, one line each; only the first of several processes talks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("prefmix")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        note(f"process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']}")
