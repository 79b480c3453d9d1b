"""`prefmix simulate --output DIR`: people with known tastes, as rows, and the truth in a file of its own."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

from prefmix.cli.output import add_format, note, print_json, print_table
from prefmix.data.simulation_options import SimulationOptions

_HELP = {
    "num_groups": "number of tastes, K_true",
    "layout": "opposed: v and -v, in pairs; orthogonal; shared: any two tastes at one cosine",
    "cosine": "of any two tastes, for layout shared",
    "scale": "standard deviation of a true margin, nats: how sure people are",
    "num_users": "users of train.jsonl and test.jsonl",
    "comparisons_per_user": "training comparisons of each",
    "test_per_user": "test comparisons of each; new users get twice as many",
    "num_new_users": "users of new_users.jsonl, who stand in no other file",
    "alpha": "Dirichlet concentration of users who share tastes; left out: one taste a user",
    "combination": "how such users judge: mixture (one taste a comparison) or log_linear (weighted reward)",
    "noise": "probability that an answer is turned around",
    "ties": "Davidson's nu: ties in nu/(2+nu) of the comparisons that are even",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb: where, over which texts, and a flag for each field of `SimulationOptions`."""
    parser.add_argument("--output", required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--texts",
        choices=("arguments", "features"),
        default="arguments",
        help="real arguments that ship with the package, or made-up feature vectors (features.json)",
    )
    parser.add_argument("--num_features", type=int, default=8, help="size of made-up vectors")
    parser.add_argument("--max_words", type=int, default=60, help="longest real argument, words")
    parser.add_argument("--seed", type=int, default=0, help="of texts, tastes, users and answers")
    parser.add_argument("--with_groups", action="store_true", help="write a `group` column, which evaluation reads")
    hints = get_type_hints(SimulationOptions)
    for field in dataclasses.fields(SimulationOptions):
        choices = get_args(hints[field.name]) if isinstance(field.default, str) else None
        kind = float if field.default is None else type(field.default)
        flag = f"--{field.name}"
        parser.add_argument(flag, type=kind, choices=choices, default=field.default, help=_HELP[field.name])
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Draws, writes, and prints what the best rules reach."""
    from prefmix.data.simulated_files import write_simulated
    from prefmix.data.simulated_texts import argument_pools, feature_pools
    from prefmix.data.simulation import simulate

    fields = [field.name for field in dataclasses.fields(SimulationOptions)]
    options = SimulationOptions(**{name: getattr(args, name) for name in fields})
    if args.texts == "features":
        pools = feature_pools(args.num_features, seed=args.seed)
    else:
        pools = argument_pools(max_words=args.max_words, seed=args.seed)
    truth = write_simulated(args.output, simulate(pools, options, args.seed), with_group=args.with_groups)
    if args.format == "json":
        print_json({"output": args.output, "oracle": truth["oracle"]})
    else:
        rules = [(split, rule, figures) for split, found in truth["oracle"].items() for rule, figures in found.items()]
        rows = [(f"{split}, {rule}", f"{f['accuracy']:.3f}", f"{f['log_loss']:.3f}") for split, rule, f in rules]
        print_table(("best possible by who knows", "accuracy", "log-loss"), rows, title=f"{args.output}")
    note("wrote the truth to truth.json; no fit reads it")
    note(f"next: prefmix validate {shlex.quote(str(Path(args.output) / 'train.jsonl'))}")
