"""`prefmix choose_k rows.jsonl --model smollm2`: how many groups of users are there?"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmix.cli.loading import add_columns, read_checked_rows
from prefmix.cli.model_check import check_model
from prefmix.cli.output import add_format, note, print_json, stdout_is_for_results
from prefmix.cli.probe import train_command

if TYPE_CHECKING:
    from prefmix.experiments.choose_k_report import ChoiceReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("data", help="rows with a `user` column (every format that `prefmix validate` reads)")
    add_columns(parser)
    parser.add_argument("--model", default="smollm2", help="base model whose states are pooled (default smollm2)")
    parser.add_argument("--max_k", type=int, default=8, help="largest number of groups to try")
    parser.add_argument("--folds", type=int, default=4, help="of users; each is held out once")
    parser.add_argument("--probe_dim", type=int, default=64, help="principal directions of the pooled states")
    parser.add_argument("--probe_restarts", type=int, default=8, help="random starts of each fit")
    parser.add_argument("--max_length", type=int, default=1024, help="longest prompt plus completion in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of folds and starts")
    parser.add_argument("--cache_dir", help="folder of cached trunk states; default: the user's cache folder")
    parser.add_argument("--confirm", action="store_true", help="also train heads for the best two K and compare them")
    parser.add_argument("--num_train_epochs", type=float, default=3, help="of the heads that --confirm trains")
    parser.add_argument("--picture", default="choose_k.svg", help="where the picture goes (default choose_k.svg)")
    parser.add_argument("--output", help="where the report goes as JSON")
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the table over K, draws the picture, and names the next command."""
    if args.max_k < 2:
        raise ValueError(f"--max_k {args.max_k}: at least 2, or there is nothing to choose")
    rows = read_checked_rows(args.data, args.split, args.user_column)
    check_model(args.model)
    with stdout_is_for_results():
        report = _search(args, rows)
    Path(args.picture).write_text(report.svg(), encoding="utf-8")
    note(f"drew {args.picture}")
    command = train_command(args, report.num_experts)
    entries = report.to_dict() | {"next": command, "picture": args.picture}
    if args.output:
        Path(args.output).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        note(f"wrote the report to {args.output}")
    print_json(entries) if args.format == "json" else print(f"{report.text()}\n\nnext: {command}")


def _search(args: argparse.Namespace, rows: list[dict[str, Any]]) -> ChoiceReport:
    from prefmix.data.tokenization import tokenize_rows
    from prefmix.experiments.choose_k_report import choose_k_rows, user_rows
    from prefmix.experiments.confirm_k import best_two, confirm
    from prefmix.experts.base_model import load_base
    from prefmix.experts.trunk_cache import build_trunk_states

    base, watched = load_base(args.model), sys.stderr.isatty()
    assert base.tokenizer is not None, "a model that is loaded by name comes with its tokenizer"
    table = tokenize_rows(rows, base.tokenizer, max_length=args.max_length, progress=watched)
    states = build_trunk_states(base, table.texts, cache_dir=args.cache_dir, progress=watched)
    report = choose_k_rows(
        table,
        states,
        candidates=range(1, args.max_k + 1),
        dim=args.probe_dim,
        seed=args.seed,
        folds=args.folds,
        restarts=args.probe_restarts,
    )
    if not args.confirm:
        return report
    options = {"cache_dir": args.cache_dir, "num_train_epochs": args.num_train_epochs, "max_length": args.max_length}
    named, counts = table.select(user_rows(table)), best_two(report.choice)
    with tempfile.TemporaryDirectory() as folder:
        found = confirm(named, states, base, counts, options, output_dir=folder, seed=args.seed)
    return report._replace(confirmation=found)
