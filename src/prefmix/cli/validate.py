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
        shown = {name: value for name, value in report.to_dict().items() if name != "unread_users"}
        print_pairs(shown, title=f"{args.data}: rows are sound")
    if report.unread_users is not None:
        if args.format == "text":
            note(f"warning: {report.unread_users}")
        return  # nothing comes next before it is mended
    if 0 < report.rows_without_user < report.kept:
        note(
            f"warning: {report.rows_without_user} of {report.kept} rows name no user; each is taken as a person "
            "of its own, who gave one comparison"
        )
    if (warning := identity_warning(report)) is not None:
        note(warning)
    else:
        note(f"next: prefmix probe {shlex.quote(args.data)}")
