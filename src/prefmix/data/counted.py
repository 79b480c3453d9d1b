"""Numbers of things in sentences."""

from __future__ import annotations


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """`1 row`, `1,200 rows`, `2 people`, `0.5 epochs`."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun if number == 1 else plural or noun + 's'}"
