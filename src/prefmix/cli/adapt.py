"""`prefmix adapt POLICY --user bob --data rows.jsonl [--save]`: weights of a user, or of nobody, without training.

With `--forget` in the place of `--data` the user is taken out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from prefmix.cli.chat import weight_lines
from prefmix.cli.loading import add_data, add_policy, load_policy, read_checked_rows
from prefmix.cli.output import add_format, note, print_json, stdout_is_for_results
from prefmix.data.counted import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_policy(parser)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="whose comparisons these are; a new name is a new user")
    who.add_argument(
        "--unknown",
        choices=("average", "worst_group", "max_min", "min_max_regret", "gate"),
        help="instead of a user: weights of everybody about whom nothing is known, good for the average or the worst "
        "group of --data, for the type of user who fares worst, or with the least regret; gate: back to the gate",
    )
    add_data(parser, required=False)
    parser.add_argument("--by", choices=("user", "group"), default="user", help="--unknown: column of the groups")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--anew", action="store_true", help="in the place of the user's earlier comparisons")
    what.add_argument("--forget", action="store_true", help="take the user out of the policy folder, name and all")
    parser.add_argument("--save", action="store_true", help="keep the user, or the default, in the policy folder")
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the posterior over experts given the user's comparisons."""
    if args.unknown:
        if args.forget or args.anew:
            raise ValueError(f"--unknown {args.unknown} with --forget or --anew: these are about a --user")
        _set_unknown(args)
        return
    if args.forget:
        _forget(args)
        return
    if args.data is None:
        raise ValueError(f"--user {args.user} without --data: give the user's comparisons (or --forget)")
    rows = rows_of(args.user, read_checked_rows(args.data, args.split, args.user_column))
    with stdout_is_for_results():
        policy = load_policy(args)
        known = policy.users.index(args.user)
        before = 0.0 if known < 0 or args.anew else float(policy.users.count[known])
        policy.adapt(args.user, rows, save=args.save, anew=args.anew)
    rate = policy.users.rate(args.user)
    if args.format == "json":
        weights = policy.weights(user=args.user).tolist()
        found = {"user": args.user, "comparisons": len(rows), "earlier": before, "weights": weights, "saved": args.save}
        print_json(found if rate is None else found | {"label_noise": rate})
        return
    print(
        f"{args.user}, {counted(len(rows), 'comparison')}"
        + (f" on top of {before:g} earlier ones" if before else "")
        + ("" if rate is None else f", {rate:.0%} of the labels flipped")
    )
    print(weight_lines(policy, args.user))
    note(f"kept in {args.policy}" if args.save else "not kept; --save keeps the user in the policy folder")


def _forget(args: argparse.Namespace) -> None:
    """Takes a user out of the folder; there is nothing else to do with it, so --save is implied."""
    if args.data is not None:
        raise ValueError(f"--forget with --data {args.data}: forgetting takes no rows; --anew learns from these alone")
    with stdout_is_for_results():
        policy = load_policy(args)
        policy.forget(args.user, save=True)
    if args.format == "json":
        print_json({"user": args.user, "forgotten": True, "users": len(policy.users)})
        return
    print(f"{args.user} is forgotten: name, evidence and weights are no longer in {args.policy}")
    note("experts keep what they learnt in training; checkpoints, reports and rows are files of their own")


def _set_unknown(args: argparse.Namespace) -> None:
    """Prints the weights of somebody unknown, and keeps them where asked."""
    rows = None if args.data is None else read_checked_rows(args.data, args.split, args.user_column)
    with stdout_is_for_results():
        policy = load_policy(args)
        policy.set_unknown_users(None if args.unknown == "gate" else args.unknown, rows, args.by)
        if args.save:
            policy.save_back()
    if args.format == "json":
        print_json({"unknown": args.unknown, "weights": policy.weights().tolist(), "saved": args.save})
        return
    print(f"somebody unknown, {args.unknown}")
    print(weight_lines(policy, None))
    note(f"kept in {args.policy}" if args.save else "not kept; --save keeps them in the policy folder")


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
