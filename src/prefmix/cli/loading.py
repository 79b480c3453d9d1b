"""Policies and rows from the command line: cheap checks first, heavy imports after."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefmix.cli.output import note
from prefmix.data.unread_users import unread_columns, unread_users
from prefmix.data.validation import read_checked
from prefmix.policy.config import PolicyConfig
from prefmix.policy.folder import CONFIG_FILE, find_policy

if TYPE_CHECKING:
    from prefmix.policy.mixture_policy import MixturePolicy


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Adds the policy folder, and where to find and run its base model."""
    parser.add_argument("policy", help="folder of a trained policy")
    parser.add_argument("--base", help="the base model, where it has moved since training")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")


def add_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the rows that a verb reads."""
    parser.add_argument("--data", required=required, help="rows (every format that `prefmix validate` reads)")
    add_columns(parser)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Adds which rows of a source are read, and whom they name."""
    parser.add_argument("--split", help="which split, where the data has several")
    parser.add_argument("--user_column", help="column that names who judged (default: user)")


def read_policy_config(args: argparse.Namespace) -> PolicyConfig:
    """What the policy says of itself, before anything heavy is loaded.

    Raises:
        ValueError: the folder holds no policy, or one that this version does not read.
    """
    return PolicyConfig.from_json((find_policy(args.policy) / CONFIG_FILE).read_text(encoding="utf-8"))


def load_policy(args: argparse.Namespace) -> MixturePolicy:
    """The policy of `add_policy`'s arguments; a line on stderr says so first, as torch and the model take seconds.

    Raises:
        ValueError: the folder holds no policy, a damaged one, or its base model is another one now.
    """
    read_policy_config(args)
    note(f"loading {args.policy} ...")
    from prefmix.policy.mixture_policy import MixturePolicy

    # The name that was given, not `folder`: after a killed save `folder` is a leftover, and `adapt --save` writes back.
    return MixturePolicy.from_pretrained(args.policy, base=args.base, device=args.device)


def read_checked_rows(
    source: str, split: str | None = None, user_column: str | None = None, *, hint: bool = True
) -> list[dict[str, Any]]:
    """Rows whose every mistake is known before a model is loaded.

    Args:
        source: a file, a folder or a name.
        split: which split, where the source has several.
        user_column: the column that names who judged; None: `user`.
        hint: whether a line on stderr points at a column that looks like who judged, where no row names a user.

    Raises:
        DataError: all mistakes, each with its row.
    """
    rows = read_checked(source, split, user_column).source.rows
    if hint:
        note_unread_users(rows)
    return rows


def note_unread_users(rows: Sequence[Mapping[str, Any]]) -> None:
    """Says on stderr which column looks like who judged, where no row names a user."""
    if (warning := unread_users(rows, unread_columns(rows))) is not None:
        note(f"warning: {warning}")
