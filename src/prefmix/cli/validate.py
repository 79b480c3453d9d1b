"""`prefmix validate FILE`: are these rows what training needs?"""

from __future__ import annotations

import argparse
import shlex

from prefmix.cli.loading import add_columns
from prefmix.cli.output import add_format, note, print_json, print_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("data", help="rows: .jsonl[.gz], .json, .csv, .parquet, a datasets folder, or a hub name")
    add_columns(parser)
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Prints what is in the rows, or every mistake with its row."""
    from prefmix.cli.plan import identity_warning
    from prefmix.data.validation import validate

    report = validate(args.data, args.split, args.user_column)
    if args.format == "json":
        print_json(report.to_dict())
    else:
        print_pairs(report.to_dict(), title=f"{args.data}: rows are sound")
    if report.unread_users is not None:
        return  # the report says it; nothing comes next before it is mended
    if (warning := identity_warning(report)) is not None:
        note(warning)
    else:
        note(f"next: prefmix probe {shlex.quote(args.data)}")
