"""What is wrong with a user's data, all of it at once: where, which field, which value, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

SHOWN_ERRORS = 10
SHOWN_CHARACTERS = 60


class RowError(NamedTuple):
    """One thing wrong with the data.

    Attributes:
        where: the place as a person counts it ("line 3", "row 3"; counted from 1), empty for the whole source.
        field: the column, empty where no single column is at fault.
        problem: what is wrong, with the value.
        remedy: what to do about it.
    """

    where: str
    field: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.where, self.field and f"'{self.field}'") if part)
        return (f"{place}: " if place else "") + f"{self.problem}. {self.remedy}"


class DataError(ValueError):
    """Data that cannot be used: shows the first ten errors and counts the rest.

    Attributes:
        source: what messages call the data (a path, a hub name, "rows").
        errors: every error found, in the order of the rows.
    """

    def __init__(self, source: str, errors: Sequence[RowError]) -> None:
        assert errors, "a DataError without an error"
        self.source = source
        self.errors = list(errors)
        super().__init__(self._message())

    def _message(self) -> str:
        if len(self.errors) == 1:
            return f"{self.source}: {self.errors[0]}"
        lines = [f"{self.source}: {len(self.errors)} errors"]
        lines += [f"  {error}" for error in self.errors[:SHOWN_ERRORS]]
        if len(self.errors) > SHOWN_ERRORS:
            lines.append(f"  ... and {len(self.errors) - SHOWN_ERRORS} more")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, every error included."""
        return {"source": self.source, "errors": [error._asdict() for error in self.errors]}


def shown(value: Any) -> str:
    """The value as an error message quotes it: short, one line."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
