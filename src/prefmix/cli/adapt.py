"""`prefmix adapt POLICY --user bob --data rows.jsonl [--save]`: weights of a user without training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from prefmix.cli.chat import weight_lines
from prefmix.cli.loading import add_data, add_policy, load_policy, read_checked_rows
from prefmix.cli.output import add_format, note, print_json, stdout_is_for_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_policy(parser)
    parser.add_argument("--user", required=True, help="whose comparisons these are; a new name is a new user")
    add_data(parser)
    parser.add_argument("--save", action="store_true", help="keep the user in the policy folder")
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the posterior over experts given the user's comparisons."""
    rows = rows_of(args.user, read_checked_rows(args.data, args.split))
    with stdout_is_for_results():
        policy = load_policy(args)
        policy.adapt(args.user, rows, save=args.save)
    if args.format == "json":
        weights = policy.weights(user=args.user).tolist()
        print_json({"user": args.user, "comparisons": len(rows), "weights": weights, "saved": args.save})
        return
    print(f"{args.user}, {len(rows)} comparisons")
    print(weight_lines(policy, args.user))
    note(f"kept in {args.policy}" if args.save else "not kept; --save keeps the user in the policy folder")


def rows_of(user: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that name this user or nobody, as this user's.

    Raises:
        ValueError: every row names somebody else.
    """
    own = [{**row, "user": user} for row in rows if row.get("user") is None or str(row["user"]) == user]
    if not own:
        others = sorted({str(row["user"]) for row in rows})
        raise ValueError(
            f"--user {user}: every row names somebody else ({', '.join(others[:5])}); name one of them, or leave the "
            "user column out"
        )
    if len(own) < len(rows):
        note(f"{len(rows) - len(own)} of {len(rows)} rows name somebody else and are left out")
    return own
