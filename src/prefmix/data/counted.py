"""Numbers of things in sentences."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 row`, `1,200 rows`, `2 people`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
