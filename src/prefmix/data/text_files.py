"""JSONL, JSON and CSV files as rows, with the line where each row begins.

The standard library only: a malformed file is named within a second, before anything heavy is imported.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefmix.data.errors import DataError, RowError, shown

# Columns that are structured; in a CSV their cells hold JSON.
JSON_CELLS = ("metadata", "tools", "chat_template_kwargs", "prompt_ids", "chosen_ids", "rejected_ids", "ranking")
TEXT_CELLS = ("prompt", "chosen", "rejected")
# How a cell begins that holds messages, or several responses.
_LISTS = {"prompt": ("[{",), "chosen": ("[{",), "rejected": ("[{", '["', "[[")}
_ONE_OBJECT_A_LINE = 'Write one JSON object a line, such as {"prompt": "...", "chosen": "...", "rejected": "..."}.'


class FileRows(NamedTuple):
    """Rows of one file.

    Attributes:
        rows: the rows.
        unit: how a person counts them: `line`, `row` or `item`.
        numbers: where each row begins, counted from 1.
        unreadable: what is wrong with records that gave no row.
    """

    rows: list[dict[str, Any]]
    unit: str
    numbers: list[int]
    unreadable: Sequence[RowError] = ()


def read_bytes(path: Path) -> bytes:
    """The bytes of the file, unpacked where its name ends in `.gz`."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except EOFError:
        problem = "the gzip file ends early"
    except (gzip.BadGzipFile, zlib.error) as error:
        problem = f"is not a sound gzip file ({error})"
    except OSError as error:
        raise DataError(
            str(path), [RowError("", "", f"cannot be read ({error.strerror})", "Check the file.")]
        ) from None
    raise DataError(str(path), [RowError("", "", problem, "Copy or download it again.")])


def read_jsonl(path: Path) -> FileRows:
    """One JSON object a line; empty lines are skipped."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    errors: list[RowError] = []
    for number, line in enumerate(_split_lines(read_bytes(path)), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_as_row(_decode(line)))
            numbers.append(number)
        except _Malformed as error:
            remedy = error.remedy or _ONE_OBJECT_A_LINE
            # An array: nothing that follows is worth a message.
            if not rows and not errors and line.lstrip().startswith(b"["):
                array = "One JSON array of objects belongs into a file named .json; .jsonl has one object a line."
                raise DataError(str(path), [RowError(f"line {number}", "", error.problem, array)]) from None
            errors.append(RowError(f"line {number}", "", error.problem, remedy))
    return FileRows(rows, "line", numbers, errors)


def read_json(path: Path) -> FileRows:
    """One JSON array of objects."""
    try:
        value = _decode(read_bytes(path).removeprefix(b"\xef\xbb\xbf"))
    except _Malformed as error:
        remedy = error.remedy or "Correct the JSON; if it has one object a line, name the file .jsonl."
        raise DataError(str(path), [RowError(error.where, "", error.problem, remedy)]) from None
    if not isinstance(value, list):
        problem = f"is a JSON {type(value).__name__}, not an array"
        raise DataError(str(path), [RowError("", "", problem, "Write an array of objects.")])
    rows, numbers, errors = [], [], []
    for number, item in enumerate(value, start=1):
        try:
            rows.append(_as_row(item))
            numbers.append(number)
        except _Malformed as error:
            errors.append(RowError(f"item {number}", "", error.problem, error.remedy or "Write an array of objects."))
    return FileRows(rows, "item", numbers, errors)


def read_csv(path: Path) -> FileRows:
    """A header and one row a record, separated by commas (tabs in `.tsv`); an empty optional cell is absent.

    Cells of structured columns, and responses that are lists of messages, hold JSON.
    """
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(str(path), [RowError(f"line {line}", "", *_not_utf8(error))]) from None
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    errors: list[RowError] = []
    records = _csv_records(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), errors)
    _, header = next(records, (1, []))
    if errors:  # no header, so no column has a name
        raise DataError(str(path), errors)
    _check_header(header, path)
    rows, numbers = [], []
    for line, cells in records:
        if len(cells) != len(header):
            problem = f"has {len(cells)} columns, the header has {len(header)} ({', '.join(header)})"
            errors.append(RowError(f"line {line}", "", problem, "Put text that holds a comma or quote in quotes."))
            continue
        rows.append({name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)})
        numbers.append(line)
    return FileRows(rows, "line", numbers, errors)


class _Malformed(Exception):
    def __init__(self, problem: str, remedy: str = "", where: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy, self.where = problem, remedy, where


def _split_lines(data: bytes) -> list[bytes]:
    # Not str.splitlines: U+2028 and its like may stand inside JSON strings.
    return data.removeprefix(b"\xef\xbb\xbf").split(b"\n")


def _decode(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise _Malformed(*_not_utf8(error)) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}"
        raise _Malformed(f"is not JSON: {error.msg} at column {error.colno}", where=where) from None
    except RecursionError:
        raise _Malformed("is nested too deeply", "Flatten the object.") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Malformed(f"'{twice}' stands twice in one object", "Keep one of the two.")
    return row


def _as_row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Malformed(f"is {type(value).__name__} {shown(value)}, not an object")
    return value


def _not_utf8(error: UnicodeDecodeError) -> tuple[str, str]:
    byte = error.object[error.start]
    return f"is not UTF-8 (byte 0x{byte:02x} at position {error.start})", "Save the file as UTF-8."


def _csv_records(reader: Any, errors: list[RowError]) -> Iterator[tuple[int, list[str]]]:
    """Every record that is not empty, with the line on which it begins; what is no record is added to `errors`."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            remedy = "Close the quotes, and double a quote inside quotes."
            errors.append(RowError(f"line {line}", "", f"is not CSV: {error}", remedy))
            continue
        if cells:
            yield line, cells


def _check_header(header: list[str], path: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        error = RowError("line 1", twice[0], "column stands twice in the header", "Rename or remove one of the two.")
        raise DataError(str(path), [error])


def _cell(name: str, text: str) -> Any:
    """A cell as JSON would give it; what cannot be read stays text, and the check of the row says what is wrong."""
    if name in TEXT_CELLS:
        messages = _json_cell(text) if text.lstrip().startswith(_LISTS[name]) else text
        return messages if isinstance(messages, list) else text
    if text == "":
        return None
    if name in JSON_CELLS:
        return _json_cell(text)
    if name in ("weight", "label"):
        try:
            return float(text)
        except ValueError:
            return text
    if name == "tie":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower(), text)
    return text


def _json_cell(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
