"""Names that were registered while the program ran, beside those that fields know by themselves. No torch here."""

from __future__ import annotations

from typing import Any, get_args

# Literal of a field -> further names.
REGISTERED: dict[Any, list[str]] = {}
# Gate terms among them whose weights change with the prompt.
PROMPT_TERMS: list[str] = ["prompt"]


def choices(literal: Any) -> tuple[Any, ...]:
    """What a field of this type accepts."""
    return (*get_args(literal), *REGISTERED.get(literal, ()))


def register(literal: Any, name: str) -> None:
    """Lets fields of this type accept a name.

    Raises:
        ValueError: it has a meaning already.
    """
    if name in choices(literal):
        raise ValueError(f"name={name!r}: there is one of that name already; choose another")
    REGISTERED.setdefault(literal, []).append(name)
