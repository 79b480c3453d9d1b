"""`prefmix score POLICY --data rows.jsonl --output scored.jsonl`: rewards and probabilities of every row."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from prefmix.cli.loading import add_data, add_policy, load_policy, read_checked_rows
from prefmix.cli.output import note, stdout_is_for_results
from prefmix.data.counted import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_policy(parser)
    add_data(parser)
    parser.add_argument("--output", help="where the scored rows go, JSON lines; default: stdout")


def run(args: argparse.Namespace) -> None:
    """Scores every row under every expert and under the mixture."""
    rows = read_checked_rows(args.data, args.split, args.user_column)
    with stdout_is_for_results():
        scores = load_policy(args).score(rows)
    lines = "".join(json.dumps(score, ensure_ascii=False) + "\n" for score in scores)
    if args.output is None:
        sys.stdout.write(lines)
    else:
        Path(args.output).write_text(lines, encoding="utf-8")
        note(f"wrote {counted(len(scores), 'scored row')} to {args.output}")
