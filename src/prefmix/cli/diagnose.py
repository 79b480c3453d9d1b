"""`prefmix diagnose rows.jsonl`: what will go wrong, before training; with `--policy`: what did, after it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prefmix.cli.loading import add_columns, load_policy, note_unread_users, read_checked_rows
from prefmix.cli.output import add_format, note, print_json, stdout_is_for_results
from prefmix.data.validation import read_checked

if TYPE_CHECKING:
    from prefmix.experiments.diagnosis import Diagnosis


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("data", help="rows; with --policy better rows that it was not trained on")
    add_columns(parser)
    parser.add_argument("--policy", help="a trained policy, or the output of a run")
    parser.add_argument("--base", help="the policy's base model, where it has moved since training")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--no_refit", action="store_true", help="do not plant groups on the rows' design (seconds)")
    parser.add_argument("--no_probe", action="store_true", help="do not compare restarts of the probe (with --policy)")
    parser.add_argument("--no_writing", action="store_true", help="do not let experts write (with --policy; seconds)")
    parser.add_argument("--probe_dim", type=int, default=64, help="principal directions of the probe")
    parser.add_argument("--cache_dir", help="folder of cached trunk states; default: the user's cache folder")
    parser.add_argument("--seed", type=int, default=0, help="of permutations, invented answers and restarts")
    parser.add_argument("--output", help="where the diagnosis goes as JSON")
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Prints every finding: what, how much, remedy."""
    with stdout_is_for_results():
        diagnosis = _rows(args) if args.policy is None else _policy(args)
    if args.output:
        Path(args.output).write_text(json.dumps(diagnosis.to_dict(), indent=2) + "\n", encoding="utf-8")
        note(f"wrote the diagnosis to {args.output}")
    print_json(diagnosis.to_dict()) if args.format == "json" else print(diagnosis.text())


def _rows(args: argparse.Namespace) -> Diagnosis:
    from prefmix.experiments.diagnose import diagnose_rows

    found = read_checked(args.data, args.split, args.user_column)
    note_unread_users(found.source.rows)
    if not args.no_refit:
        note("planting opposed groups on these users and pairs, to see whether they would be found ...")
    return diagnose_rows(found.checked.rows, args.data, refit=not args.no_refit, seed=args.seed)


def _policy(args: argparse.Namespace) -> Diagnosis:
    rows = read_checked_rows(args.data, args.split, args.user_column)
    policy = load_policy(args)  # before the imports: it says what takes so long
    from prefmix.evaluation.cached_states import StateCache
    from prefmix.experiments.diagnose import diagnose_policy

    cache = None if args.no_probe else StateCache("disk", args.cache_dir, progress=sys.stderr.isatty())
    writes = not args.no_writing
    return diagnose_policy(
        policy, rows, args.policy, cache=cache, probe_dim=args.probe_dim, seed=args.seed, writes=writes
    )
