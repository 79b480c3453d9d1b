"""`prefmix evaluate POLICY --data held_out.jsonl`: accuracy, log-loss and calibration of a policy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prefmix.cli.loading import add_data, add_policy, load_policy, read_checked_rows
from prefmix.cli.output import add_format, note, print_json, stdout_is_for_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_policy(parser)
    add_data(parser)
    parser.add_argument("--context", help="other rows of the same users, from which new users' weights are inferred")
    parser.add_argument("--output", help="where the report goes as JSON")
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the report; population (gate only) and personalised (posterior of each user) side by side."""
    rows = read_checked_rows(args.data, args.split)
    context = read_checked_rows(args.context) if args.context else None
    with stdout_is_for_results():
        from prefmix.evaluation.evaluator import evaluate

        report = evaluate(load_policy(args), rows, context_rows=context)
    if args.output:
        Path(args.output).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        note(f"wrote the report to {args.output}")
    if args.format == "json":
        print_json(report.to_dict())
    else:
        print(report.table())
