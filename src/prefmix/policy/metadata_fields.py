"""Which metadata the gate reads, and what it is told that it does not know.

Legend: B rows.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prefmix.data.counted import counted
from prefmix.data.users import MetadataEncoder
from prefmix.mixture.gates import Gate

MOST_NAMED = 5


def silent_fields(gate: Gate, encoder: MetadataEncoder | None) -> tuple[str, ...]:
    """Metadata fields to which the gate gives no weight at all: they say nothing of which expert serves whom."""
    if "metadata" not in gate.terms or encoder is None:
        return ()
    heard = {f for f, weights in zip(encoder.field_of_feature, gate.metadata.weight.T, strict=True) if weights.any()}
    return tuple(name for place, name in enumerate(encoder.field_names) if place not in heard)


def check_metadata(encoder: MetadataEncoder, entries: Sequence[Mapping[str, Any] | None]) -> None:
    """Warns of values that never occurred in training and of rows of which the gate knows no field.

    Further fields beside known ones are what other programs read; a row that has only those is likely misspelt.

    Args:
        encoder: of the gate.
        entries: B mappings; None and empty ones are rows without metadata, which is no mistake.

    Raises:
        ValueError: an entry is no mapping.
    """
    for entry in entries:
        if entry is not None and not isinstance(entry, Mapping):
            raise ValueError(
                f"metadata={entry!r}: give a mapping of fields, such as {{{encoder.field_names[0]!r}: ...}}"
            )
    known, unknown, strange = set(encoder.field_names), Counter[str](), 0
    for entry in entries:
        told = {name: value for name, value in (entry or {}).items() if value is not None}
        ignored = encoder.ignored(told)
        unseen = ignored if known.isdisjoint(told) else [name for name in ignored if name not in told]
        unknown.update(unseen)
        strange += bool(unseen)
    if not unknown:
        return
    names = ", ".join(name for name, _ in unknown.most_common(MOST_NAMED))
    names += ", ..." if len(unknown) > MOST_NAMED else ""
    warnings.warn(
        f"metadata of {strange:,} of {counted(len(entries), 'row')} did not occur in training and count as unknown: "
        f"{names}; the gate reads {', '.join(encoder.feature_names[:20])}",
        stacklevel=6,
    )
