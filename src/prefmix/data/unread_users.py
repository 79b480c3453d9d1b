"""Rows that name nobody beside a column that looks like who judged: pointed out, and read as users only where asked."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from prefmix.data.errors import DataError, RowError
from prefmix.data.responses import TOKEN_COLUMNS

KNOWN_COLUMNS = (
    *("prompt", "chosen", "rejected", "user", "group", "weight", "metadata", "tie", "tools", "chat_template_kwargs"),
    *("label", "ranking"),
    *TOKEN_COLUMNS,
)
NAMES_OF_USERS = (
    *("annotator", "annotator_id", "user_id", "userid", "users", "user_name", "username", "worker", "worker_id"),
    *("rater", "rater_id", "judge", "judge_id", "labeler", "labeler_id", "labeller", "labeller_id"),
    *("participant", "participant_id", "person", "person_id", "evaluator", "evaluator_id"),
)
_NEAR = 0.75  # difflib's ratio: one letter of `user` lost, added or in another place


def unread_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that training does not read, in the order in which they first occur."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [column for column in columns if column not in KNOWN_COLUMNS]


def unread_users(rows: Sequence[Mapping[str, Any]], unread_columns: Sequence[str]) -> str | None:
    """What to say where no row has a `user` but another column seems to hold one.

    Args:
        rows: rows as they were read.
        unread_columns: columns that nothing reads; the first telling name of them wins, else the nearest to `user`.

    Returns:
        One sentence with the column, its count of values and the remedy; None where there is nothing to say.
    """
    found = _likely_column(rows, unread_columns)
    if found is None:
        return None
    column, values = found
    count = "one value" if values == 1 else f"{values} values"
    return (
        f"column {column!r} ({count}) looks like who judged; rename it to 'user' (datasets: "
        f"data.rename_column({column!r}, 'user'); on the command line: --user_column {shlex.quote(column)}), or users "
        "cannot be told apart"
    )


def rows_by_user(rows: Sequence[Mapping[str, Any]], column: str, source: str = "rows") -> list[dict[str, Any]]:
    """Rows whose `user` is what stands in another column; that column is left out.

    Args:
        rows: rows as they were read.
        column: whose values name users; a `user` that stands beside it is replaced.
        source: what messages call the rows.

    Raises:
        DataError: no row has such a column, with the nearest name.
    """
    columns = dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row)
    if rows and column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        remedy = f"Name {near[0]!r}." if near else f"Name one of: {', '.join(map(str, columns))}."
        raise DataError(source, [RowError("", column, "no row has this column (user_column)", remedy)])
    return [
        {**{name: value for name, value in row.items() if name != column}, "user": row.get(column)}
        if isinstance(row, Mapping)
        else row
        for row in rows
    ]


def _likely_column(rows: Sequence[Mapping[str, Any]], unread_columns: Sequence[str]) -> tuple[str, int] | None:
    """The column that looks like who judged, and how many values it has."""
    if any(row.get("user") is not None for row in rows):
        return None
    plain = {column: str(column).strip().lower().replace("-", "_").replace(" ", "_") for column in unread_columns}
    told = [column for column, name in plain.items() if name in NAMES_OF_USERS]
    near = difflib.get_close_matches("user", plain.values(), n=3, cutoff=_NEAR)
    told += [column for name in near for column, other in plain.items() if other == name]
    for column in told:
        values = {row.get(column) for row in rows if isinstance(row.get(column), str | int)}
        if values:
            return column, len(values)
    return None
