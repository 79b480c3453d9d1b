"""The optional columns of a row: who judged, how much it counts, and what is known about the judge."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from prefmix.data.errors import shown
from prefmix.data.responses import Report

MetadataValue = str | float | int | bool


class Attributes(NamedTuple):
    """Everything about a row but its responses.

    Attributes:
        user: who judged; None where nobody is named. Numbers become text: 7 is "7".
        group: the true group, for evaluation; None where absent.
        weight: how much the row counts, positive; 1 where absent, 0 for a row to leave out.
        metadata: what is known about user and context; null values are absent.
        tie: the judge found both equal.
        label: probability in [0, 1] that `chosen` is the better one; None where absent (it counts as 1).
        tools: the tools that the chat template is told about.
        chat_template_kwargs: further arguments of the chat template.
    """

    user: str | None
    group: str | None
    weight: float
    metadata: dict[str, MetadataValue]
    tie: bool
    label: float | None
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any]


def check_attributes(row: Mapping[str, Any], report: Report) -> Attributes:
    """The optional columns of a row; what is wrong is reported and read as absent."""
    return Attributes(
        user=_name(row, "user", report),
        group=_name(row, "group", report),
        weight=_weight(row.get("weight"), report),
        metadata=_metadata(row.get("metadata"), report),
        tie=_tie(row.get("tie"), report),
        label=_label(row, report),
        tools=_tools(row.get("tools"), report),
        chat_template_kwargs=_template_arguments(row.get("chat_template_kwargs"), report),
    )


def _name(row: Mapping[str, Any], column: str, report: Report) -> str | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, str):
        if not value.strip():
            report(column, f"is empty text {value!r}", f"Give the {column} a name, or leave the field out (null).")
            return None
        return value
    # A column of integers with gaps comes out of pandas as floats: 3.0 is 3.
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if whole and type(value) is not bool:
        return str(int(value))
    report(column, f"is {type(value).__name__} {shown(value)}", f"Name one {column} by text or by a whole number.")
    return None


def _weight(value: Any, report: Report) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, Real):
        report("weight", f"is {type(value).__name__} {shown(value)}, not a number", "Write a number such as 0.5.")
        return 1.0
    weight = float(value)
    if not math.isfinite(weight):
        report("weight", f"is {weight}", "Write a finite number, or leave the field out (it counts as 1).")
        return 1.0
    if weight < 0:
        report("weight", f"is {weight}, negative", "Write 0 or more; swap 'chosen' and 'rejected' to turn a row round.")
        return 1.0
    return weight


def _metadata(value: Any, report: Report) -> dict[str, MetadataValue]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        remedy = 'Write a mapping such as {"user_age": 31, "device": "phone"}.'
        report("metadata", f"is {type(value).__name__} {shown(value)}, not a mapping", remedy)
        return {}
    kept: dict[str, MetadataValue] = {}
    for key, entry in value.items():
        if entry is None:
            continue
        if not isinstance(key, str) or not isinstance(entry, str | bool | int | float):
            remedy = "Values are text, numbers, true/false or null: give each part a field of its own."
            report(f"metadata.{key}", f"is {type(entry).__name__} {shown(entry)}", remedy)
        elif isinstance(entry, float) and not math.isfinite(entry):
            report(f"metadata.{key}", f"is {entry}", "Write a finite number, or null where it is unknown.")
        else:
            kept[key] = entry
    return kept


def _tie(value: Any, report: Report) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    report("tie", f"is {type(value).__name__} {shown(value)}", "Write true, false or nothing.")
    return False


def _label(row: Mapping[str, Any], report: Report) -> float | None:
    value = row.get("label")
    if value is None:
        return None
    remedy = "Give the probability that 'chosen' is the better one, or rename a column that means something else."
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        report("label", f"is {type(value).__name__} {shown(value)}, not a number from 0 to 1", remedy)
        return None
    if row.get("tie") is True:
        report(
            "label",
            f"is {shown(value)} on a tie",
            "Leave one out: 0.5 says that judges are split, a tie that none sees.",
        )
        return None
    return float(value)


def _tools(value: Any, report: Report) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            report("tools", f"is text that is not JSON ({error})", "Write a list of tool descriptions.")
            return None
    if value is None or isinstance(value, list):
        return value
    report("tools", f"is {type(value).__name__} {shown(value)}, not a list", "Write a list of tool descriptions.")
    return None


def _template_arguments(value: Any, report: Report) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    remedy = 'Write a mapping such as {"enable_thinking": false}.'
    report("chat_template_kwargs", f"is {type(value).__name__} {shown(value)}, not a mapping", remedy)
    return {}
