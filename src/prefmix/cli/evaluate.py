"""`prefmix evaluate POLICY --data held_out.jsonl`: accuracy, log-loss and calibration of a policy."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from prefmix.cli.loading import add_data, add_policy, load_policy, read_checked_rows
from prefmix.cli.output import add_format, note, print_json, stdout_is_for_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_policy(parser)
    add_data(parser)
    parser.add_argument("--context", help="other rows of the same users, from which new users' weights are inferred")
    parser.add_argument(
        "--cache_states",
        choices=("disk", "memory", "off"),
        default="disk",
        help="where states of the frozen trunk are found and kept, as in training (heads only)",
    )
    parser.add_argument("--cache_dir", help="folder of cached trunk states; default: the user's cache folder")
    parser.add_argument("--output", help="where the report goes as JSON")
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Prints figures, population (gate only) and personalised (posterior of each user), and what they mean."""
    rows = read_checked_rows(args.data, args.split, args.user_column)
    context = read_checked_rows(args.context, None, args.user_column) if args.context else None
    with stdout_is_for_results():
        policy = load_policy(args)  # before the imports: it says what takes so long
        from prefmix.evaluation.cached_states import StateCache
        from prefmix.evaluation.evaluator import evaluate
        from prefmix.experiments.diagnose import learnt_noise
        from prefmix.experiments.diagnosis import Diagnosis
        from prefmix.experiments.verdicts import verdicts

        cache = StateCache(args.cache_states, args.cache_dir, progress=sys.stderr.isatty())
        report = evaluate(policy, rows, context_rows=context, cache=None if args.cache_states == "off" else cache)
        said = Diagnosis("evaluation", verdicts(report, learnt_noise(policy)))
    found = report.to_dict() | {"findings": said.to_dict()["findings"]}
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        note(f"wrote the report to {args.output}")
    if args.format == "json":
        print_json(found)
    else:
        print("\n".join([report.table(), *said.lines()]))
