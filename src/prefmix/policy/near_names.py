"""The known name that somebody may have meant who typed an unknown one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MAX_CANDIDATES = 2_000
LENGTHS_APART = 2
CUTOFF = 0.75


def near_name(name: str, known: Iterable[str]) -> str | None:
    """The nearest known name; None where none is near.

    Numbers must agree: `user81` is somebody else than `user8`. What is compared letter by letter are names of about the
    same length that begin or end alike, so that a hundred thousand names take a fraction of a second; where these are
    still many, names are codes, and only another case or surrounding spaces count as a slip.
    """
    plain, digits = name.strip().casefold(), re.findall(r"\d+", name)
    candidates = []
    for other in known:
        if other.strip().casefold() == plain:
            return other
        if other and plain and abs(len(other) - len(name)) <= LENGTHS_APART:
            alike = other[0].casefold() == plain[0] or other[-1].casefold() == plain[-1]
            if alike and re.findall(r"\d+", other) == digits:
                candidates.append(other)
    if len(candidates) > MAX_CANDIDATES:
        return None
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=CUTOFF)
    return close[0] if close else None
