"""`prefmix adapt POLICY --user bob --data rows.jsonl [--save]`: weights of a user without training."""

from __future__ import annotations

import argparse

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
    rows = [{**row, "user": args.user} for row in read_checked_rows(args.data, args.split)]
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
