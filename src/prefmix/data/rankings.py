"""Rows that order more than two responses: `ranking`, best first, or `chosen` with a list of `rejected`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from prefmix.data.errors import shown
from prefmix.data.responses import TOKEN_COLUMNS, Content, Report, Responses, check_content, check_responses

RANKING = "ranking"


class Unfolded(NamedTuple):
    """A ranking as a pair of its first and last response, and what stands between them.

    Attributes:
        row: the row with `chosen` and `rejected` as single responses.
        between: the others, best first.
        stages: how many places were judged: all but the last, or 1 where only the best is known.
        names: what messages call the responses between.
        ends: what they call the first and the last.
    """

    row: Mapping[str, Any]
    between: tuple[Content, ...]
    stages: int
    names: tuple[str, ...]
    ends: tuple[str, str]

    @property
    def in_order(self) -> tuple[Content, ...]:
        """All responses, best first."""
        return (self.row.get("chosen"), *self.between, self.row["rejected"])


def is_ranking(row: Mapping[str, Any]) -> bool:
    """Whether a row orders a list of responses; a list of messages is one response."""
    rejected = row.get("rejected")
    several = isinstance(rejected, list) and not all(isinstance(part, Mapping) for part in rejected)
    return row.get(RANKING) is not None or several


def check_ranking(row: Mapping[str, Any], report: Report) -> Responses | None:
    """The responses of a row for which `is_ranking` holds, or None after reporting what is wrong."""
    unfolded = _best_of(row, report) if row.get(RANKING) is None else _in_order(row, report)
    if unfolded is None:
        return None
    if row.get("prompt") is None:
        report("prompt", "is missing", "Rankings name their prompt: add the column.")
        return None
    first, last = unfolded.ends
    texts = dict(zip((first, *unfolded.names, last), unfolded.in_order, strict=True))
    sound = [check_content({name: text}, name, report) for name, text in texts.items()]  # all, to report all
    if not all(sound):
        return None
    if any(isinstance(text, list) != isinstance(row["prompt"], list) for text in texts.values()):
        report(_column(row), "mixes text and messages", "Use one kind for the prompt and all responses of a row.")
        return None
    # `tie=True`: equal ends are found below, with all other repetitions, under the name that the row has for them.
    responses = check_responses(unfolded.row, True, report)
    if responses is None:
        return None
    if any(text in unfolded.in_order[:i] for i, text in enumerate(unfolded.in_order)):
        report(_column(row), "holds one response twice", "Name every response once; a row of two may be a `tie`.")
        return None
    return responses._replace(between=unfolded.between, stages=unfolded.stages)


def _column(row: Mapping[str, Any]) -> str:
    return "rejected" if row.get(RANKING) is None else RANKING


def _in_order(row: Mapping[str, Any], report: Report) -> Unfolded | None:
    ranking = row[RANKING]
    beside = [name for name in ("chosen", "rejected", *TOKEN_COLUMNS) if row.get(name) is not None]
    if beside:
        report(RANKING, f"stands beside {', '.join(beside)}", "Give a ranking, or a pair, not both.")
        return None
    if not isinstance(ranking, list) or len(ranking) < 2:
        remedy = "List at least two responses, best first."
        report(RANKING, f"is {type(ranking).__name__} {shown(ranking)}, not a list of responses", remedy)
        return None
    pair = {**row, "chosen": ranking[0], "rejected": ranking[-1]}
    first, *names, last = (f"{RANKING}[{i}]" for i in range(len(ranking)))
    return Unfolded(pair, tuple(ranking[1:-1]), len(ranking) - 1, tuple(names), (first, last))


def _best_of(row: Mapping[str, Any], report: Report) -> Unfolded | None:
    rejected = row["rejected"]
    if any(row.get(name) is not None for name in TOKEN_COLUMNS):
        report("rejected", "is a list beside token ids", "Rankings are read as text or messages: leave the ids out.")
        return None
    if not rejected:
        report("rejected", "is an empty list", "List at least one other response.")
        return None
    *names, last = (f"rejected[{i}]" for i in range(len(rejected)))
    return Unfolded({**row, "rejected": rejected[-1]}, tuple(rejected[:-1]), 1, tuple(names), ("chosen", last))
