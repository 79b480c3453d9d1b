"""How results reach the reader: JSON or a table on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def add_format(parser: argparse.ArgumentParser) -> None:
    """Adds `--format text|json`."""
    parser.add_argument("--format", choices=("text", "json"), default="text", help="how results are printed")


def note(text: str) -> None:
    """One line about what is going on, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout; plain text where colours are unwelcome (NO_COLOR, a pipe)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False).print(table)


def print_pairs(pairs: Mapping[str, Any], title: str | None = None) -> None:
    """`name  value` lines on stdout."""
    if title:
        print(title)
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        print(f"  {name:{width}}  {_cell(value)}")


@contextlib.contextmanager
def stdout_is_for_results() -> Iterator[None]:
    """Sends what libraries print to stderr while a model loads, trains or scores."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value) or "-"
    return str(value)
