"""What a preference row is, and the check of all rows: pure Python, so that bad data is named before torch is loaded.

Columns: `prompt` (may be implicit), `chosen`, `rejected` as text or messages, or `prompt_ids`, `chosen_ids`,
`rejected_ids`; or `ranking`, a list of responses, best first, or `chosen` with a list of `rejected`; optional `user`,
`group`, `weight`, `metadata`, `tie`, `label`, `tools`, `chat_template_kwargs`. Others are left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from prefmix.data.attributes import Attributes, MetadataValue, check_attributes
from prefmix.data.errors import DataError, RowError, shown
from prefmix.data.rankings import RANKING, check_ranking, is_ranking
from prefmix.data.responses import TOKEN_COLUMNS, Responses, check_responses

__all__ = ["USER_FIELD_PREFIX", "CheckedRows", "DataError", "PreferenceRow", "RowError", "check_rows"]

USER_FIELD_PREFIX = "user_"
TIE = "tie"
ZERO_WEIGHT = "weight 0"


class PreferenceRow(NamedTuple):
    """A usable comparison.

    Attributes:
        source_row: zero-based position in the input.
        responses: prompt, chosen and rejected.
        attributes: user, group, weight, metadata and the chat template's arguments.
    """

    source_row: int
    responses: Responses
    attributes: Attributes


class CheckedRows(NamedTuple):
    """Rows without an error.

    Attributes:
        rows: the comparisons to use.
        form: `standard`, `conversational` or `tokenized`; one for all rows.
        dropped: reason -> count of rows left out (`tie`: nothing models ties, or both texts are one; `weight 0`: counts
            for nothing).
    """

    rows: list[PreferenceRow]
    form: str
    dropped: dict[str, int]


def numbered(index: int) -> str:
    """Where row `index` stands when nothing better is known than its order."""
    return f"row {index + 1}"


def check_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    where: Callable[[int], str] = numbered,
    source: str = "rows",
    keep_ties: bool = False,
) -> CheckedRows:
    """Checks every row and finds every error.

    Args:
        rows: mappings from column to value.
        where: zero-based row -> the place as a person finds it ("line 3").
        source: what messages call the data.
        keep_ties: ties are data (a likelihood of ties reads them); else they are left out and counted.

    Raises:
        DataError: listing all errors with place, field, value and remedy.
    """
    rows = list(rows)
    _check_columns(rows, source)
    check = _RowCheck(where)
    checked = [check.row(index, row) for index, row in enumerate(rows)]
    if check.errors:
        raise DataError(source, check.errors)
    dropped: Counter[str] = Counter()
    kept = []
    for row in checked:
        assert row is not None, "a row was refused without an error"
        reason = _why_dropped(row, keep_ties)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(row)
    if not kept:
        raise DataError(
            source, [RowError("", "", f"no row is left: {_counts(dropped)}", "Add rows with a preference.")]
        )
    return CheckedRows(kept, kept[0].responses.form, dict(dropped))


def _why_dropped(row: PreferenceRow, keep_ties: bool) -> str | None:
    responses = row.responses
    same = responses.chosen == responses.rejected if responses.token_ids is None else _same_ids(responses)
    if row.attributes.tie and (same or not keep_ties):
        return TIE
    return ZERO_WEIGHT if row.attributes.weight == 0 else None


def _same_ids(responses: Responses) -> bool:
    assert responses.token_ids is not None
    return responses.token_ids.chosen_ids == responses.token_ids.rejected_ids


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in dropped.items())


def _check_columns(rows: list[Any], source: str) -> None:
    """A column that is missing everywhere is one error, not one for each row."""
    if not rows:
        raise DataError(source, [RowError("", "", "holds no rows", "Add at least one comparison.")])
    columns: dict[str, None] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            error = RowError(numbered(index), "", f"is {type(row).__name__}, not a mapping", "Write {column: value}.")
            raise DataError(source, [error])
        columns.update(dict.fromkeys(map(str, row)))
    if any(name in columns for name in (*TOKEN_COLUMNS, RANKING)):
        return
    missing = [name for name in ("chosen", "rejected") if name not in columns]
    remedy = f"Rename the column that holds it. Columns found: {', '.join(columns) or 'none'}."
    if missing:
        errors = [RowError(numbered(0), name, "column is missing in every row", remedy) for name in missing]
        raise DataError(source, errors)


class _RowCheck:
    """Row by row, with what must agree between rows: form, explicit prompts, and `user_*` fields."""

    def __init__(self, where: Callable[[int], str]) -> None:
        self.errors: list[RowError] = []
        self._where = where
        self._first: tuple[str, bool, str] | None = None
        self._users: dict[str, tuple[dict[str, MetadataValue], str]] = {}

    def row(self, index: int, row: Mapping[str, Any]) -> PreferenceRow | None:
        place = self._where(index)

        def report(field: str, problem: str, remedy: str) -> None:
            self.errors.append(RowError(place, field, problem, remedy))

        if row.get("image") is not None or row.get("images") is not None:
            report("images", "rows with images are not supported", "Remove the column; only text is read.")
        attributes = check_attributes(row, report)
        responses = self._responses(row, attributes, report)
        self._check_user_fields(attributes, place, report)
        if responses is None:
            return None
        self._check_form(responses.form, row.get("prompt") is not None, place, report)
        return PreferenceRow(index, responses, attributes)

    def _responses(
        self, row: Mapping[str, Any], attributes: Attributes, report: Callable[[str, str, str], None]
    ) -> Responses | None:
        if not is_ranking(row):
            return check_responses(row, attributes.tie, report)
        for field, given in (("tie", attributes.tie), ("label", attributes.label is not None)):
            if given:
                report(field, "is given beside a ranking", "Leave it out: ties and labels belong to rows of two.")
        return check_ranking(row, report)

    def _check_form(self, form: str, explicit: bool, place: str, report: Callable[[str, str, str], None]) -> None:
        if self._first is None:
            self._first = (form, explicit, place)
            return
        first_form, first_explicit, first_place = self._first
        if form != first_form:
            # The end-of-sequence token is added to all rows or to none, so a mixture would be half wrong.
            problem = f"is {form} while {first_place} is {first_form}"
            report("chosen", problem, "Use plain text in all rows, or lists of messages in all rows.")
        elif explicit != first_explicit:
            problem = f"is {'given' if explicit else 'missing'} here but not in {first_place}"
            report("prompt", problem, "Give every row a prompt, or none.")

    def _check_user_fields(self, attributes: Attributes, place: str, report: Callable[[str, str, str], None]) -> None:
        if attributes.user is None:
            return
        fields = {key: value for key, value in attributes.metadata.items() if key.startswith(USER_FIELD_PREFIX)}
        known, known_place = self._users.setdefault(attributes.user, (fields, place))
        if fields == known:
            return
        for key in sorted(known.keys() | fields.keys()):
            if fields.get(key) != known.get(key):
                problem = (
                    f"is {shown(fields.get(key))} for user '{attributes.user}' but was {shown(known.get(key))} "
                    f"in {known_place}"
                )
                remedy = "Fields named user_* are constant within a user: correct it, or rename the field."
                report(f"metadata.{key}", problem, remedy)
