"""Are these rows what training needs, and what is in them? Pure Python: an answer comes before torch is loaded."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from prefmix.data.errors import DataError, RowError
from prefmix.data.readers import RowSource, Source, read_readable
from prefmix.data.schema import CheckedRows, PreferenceRow, check_rows
from prefmix.data.unread_users import rows_by_user, unread_columns, unread_users


@dataclass(frozen=True)
class ValidationReport:
    """What sound rows hold.

    Attributes:
        source: what was read.
        rows: rows read.
        kept: rows that training can use (before the tokenizer has its say about length).
        dropped: reason -> rows left out (`tie`, `weight 0`).
        form: `standard`, `conversational` or `tokenized`.
        implicit_prompt: the prompt is the common beginning of both responses.
        prompts: distinct prompts among the kept rows, as are all counts below.
        texts: distinct (prompt, response) texts.
        duplicates: rows that repeat an earlier row: same user, prompt and responses, same preference.
        contradictions: rows that say the opposite of an earlier row of the same user.
        both_directions: pairs of texts that some rows prefer one way and some the other, whoever judged.
        users: distinct users.
        rows_without_user: rows that name nobody.
        rows_per_user_median: half of the users have at most as many rows; 0 without users, as are the next two.
        rows_per_user_max: rows of the busiest user.
        users_with_one_row: users whose group nothing but the gate can tell.
        groups: distinct true groups.
        weight_min: smallest row weight.
        weight_max: largest row weight.
        metadata_fields: field -> rows that have it.
        extra_columns: columns that training does not read.
        unread_users: what to do about one of them that looks like who judged, where no row names a user.
    """

    source: str
    rows: int
    kept: int
    dropped: Mapping[str, int]
    form: str
    implicit_prompt: bool
    prompts: int
    texts: int
    duplicates: int
    contradictions: int
    both_directions: int
    users: int
    rows_without_user: int
    rows_per_user_median: float
    rows_per_user_max: int
    users_with_one_row: int
    groups: int
    weight_min: float
    weight_max: float
    metadata_fields: Mapping[str, int]
    extra_columns: Sequence[str]
    unread_users: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, one entry for each attribute."""
        return asdict(self)


class CheckedSource(NamedTuple):
    """Rows as they were read, and as they were checked."""

    source: RowSource
    checked: CheckedRows


def read_checked(source: Source, split: str | None = None, user_column: str | None = None) -> CheckedSource:
    """Reads and checks rows; lines that are no rows at all do not hide the mistakes of the others.

    Args:
        source: everything that `readers.read_source` reads.
        split: which split, where the source has several.
        user_column: the column that names who judged; None: `user`.

    Raises:
        DataError: all mistakes, each with place, field, value and remedy.
    """
    found = read_readable(source, split)
    if user_column is not None and user_column != "user":
        found = found._replace(rows=rows_by_user(found.rows, user_column, found.name))
    errors = list(found.unreadable)
    if found.rows or not errors:
        try:
            checked = check_rows(found.rows, where=found.where, source=found.name)
        except DataError as error:
            errors += error.errors
    if errors:
        raise DataError(found.name, sorted(errors, key=_place))
    return CheckedSource(found, checked)


def _place(error: RowError) -> int:
    number = re.search(r"\d+", error.where)
    return int(number.group()) if number else 0


def validate(source: Source, split: str | None = None, user_column: str | None = None) -> ValidationReport:
    """Reads and checks rows, and counts what is in them.

    Args:
        source: everything that `readers.read_source` reads.
        split: which split, where the source has several.
        user_column: the column that names who judged; None: `user`.

    Raises:
        DataError: all mistakes, each with place, field, value and remedy.
    """
    found, checked = read_checked(source, split, user_column)
    per_user = Counter(row.attributes.user for row in checked.rows if row.attributes.user is not None)
    weights = [row.attributes.weight for row in checked.rows]
    extra = unread_columns(found.rows)
    return ValidationReport(
        source=found.name,
        rows=len(found.rows),
        kept=len(checked.rows),
        dropped=checked.dropped,
        form=checked.form,
        implicit_prompt=checked.form != "tokenized" and found.rows[0].get("prompt") is None,
        **_count_texts(checked.rows),
        users=len(per_user),
        rows_without_user=sum(row.attributes.user is None for row in checked.rows),
        rows_per_user_median=statistics.median(per_user.values()) if per_user else 0,
        rows_per_user_max=max(per_user.values(), default=0),
        users_with_one_row=sum(count == 1 for count in per_user.values()),
        groups=len({row.attributes.group for row in checked.rows} - {None}),
        weight_min=min(weights),
        weight_max=max(weights),
        metadata_fields=dict(Counter(key for row in checked.rows for key in row.attributes.metadata)),
        extra_columns=extra,
        unread_users=unread_users(found.rows, extra),
    )


def _count_texts(rows: Sequence[PreferenceRow]) -> dict[str, int]:
    prompts: dict[Any, int] = {}
    texts: dict[Any, int] = {}
    judged: set[tuple[str | None, tuple[int, ...]]] = set()
    directions: set[tuple[int, int]] = set()
    duplicates = contradictions = 0
    for row in rows:
        prompt, *responses = row.responses.token_ids or (row.responses.prompt, *row.responses.in_order)
        prompt_id = prompts.setdefault(_key(prompt), len(prompts))
        order = tuple(texts.setdefault((prompt_id, _key(text)), len(texts)) for text in responses)
        user = row.attributes.user
        # Without a name nobody knows whether two equal rows come from one person.
        duplicates += user is not None and (user, order) in judged
        contradictions += user is not None and (user, order[::-1]) in judged
        judged.add((user, order))
        directions.add((order[0], order[-1]))
    return {
        "prompts": len(prompts),
        "texts": len(texts),
        "duplicates": duplicates,
        "contradictions": contradictions,
        "both_directions": sum(a < b and (b, a) in directions for a, b in directions),
    }


def _key(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=repr)
