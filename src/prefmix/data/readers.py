"""Rows from wherever they are: JSONL, JSON, CSV, Parquet, a folder, a `datasets` object or a hub name.

Text files are read with the standard library; pyarrow and datasets are imported only for what needs them.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from prefmix.data.errors import DataError, RowError
from prefmix.data.text_files import FileRows, read_csv, read_json, read_jsonl

if TYPE_CHECKING:
    import datasets

Source = Union[str, Path, Iterable[Mapping[str, Any]], "datasets.Dataset", "datasets.DatasetDict"]

DEFAULT_SPLIT = "train"
_PARQUET_MARK = b"PAR1"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class RowSource(NamedTuple):
    """Rows and how a person finds one of them again.

    Attributes:
        name: what messages call the source.
        rows: the rows, every column kept.
        unit: `line` (of a text file), `item` (of a JSON array) or `row`.
        numbers: for each row, its place counted from 1.
        unreadable: what is wrong with records that gave no row; `read_source` refuses a source that has any.
    """

    name: str
    rows: list[dict[str, Any]]
    unit: str
    numbers: Sequence[int]
    unreadable: Sequence[RowError] = ()

    def where(self, index: int) -> str:
        """The place of row `index` (zero-based), such as "line 3"."""
        return f"{self.unit} {self.numbers[index]}"


def read_rows(source: Source, split: str | None = None) -> list[dict[str, Any]]:
    """The rows of `source`; see `read_source`."""
    return read_source(source, split).rows


def read_source(source: Source, split: str | None = None) -> RowSource:
    """Reads rows and remembers where they stood.

    Args:
        source: a file (`.jsonl`, `.json`, `.csv`, `.tsv`, each also `.gz`; `.parquet`), a folder of such files or one
            saved by `datasets`, rows in memory, a `datasets` object, the name of a public set that `load_named` knows,
            or the name of a data set on the hub.
        split: which split of a source that has several; `train` where there is a choice and none is named.

    Raises:
        DataError: naming the file, the line, and what to do.
    """
    found = read_readable(source, split)
    if found.unreadable:
        raise DataError(found.name, found.unreadable)
    return found


def read_readable(source: Source, split: str | None = None) -> RowSource:
    """As `read_source`, but records that give no row are listed in `unreadable`, so that all mistakes come at once."""
    if isinstance(source, str | Path):
        return _read_path(source, split)
    if "datasets" in sys.modules:
        loaded = _from_datasets(source, split, name="dataset")
        if loaded is not None:
            return loaded
    if isinstance(source, Mapping):
        remedy = "Give a list of {column: value} rows; for columns use datasets.Dataset.from_dict(...)."
        raise DataError("rows", [RowError("", "", "is one mapping, not a list of rows", remedy)])
    rows = [dict(row) if isinstance(row, Mapping) else row for row in source]
    return _in_order("rows", rows)  # type: ignore[arg-type]


def _in_order(name: str, rows: list[dict[str, Any]]) -> RowSource:
    return RowSource(name, rows, "row", range(1, len(rows) + 1))


def _read_path(source: str | Path, split: str | None) -> RowSource:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    if path.exists():
        return _read_file(path)
    if isinstance(source, str) and _FILE_READERS.keys().isdisjoint(_suffixes(path)):
        from prefmix.data.datasets import NAMED_SETS, load_named

        if source in NAMED_SETS:
            return _in_order(source, load_named(source, split=split))
        if _HUB_NAME.fullmatch(source) and not source.startswith("."):
            return _from_hub(source, split)
    near = difflib.get_close_matches(path.name, _names_in(path.parent), n=3)
    remedy = (
        f"Did you mean {' or '.join(near)}?"
        if near
        else "Check the path; it is read relative to the folder you are in."
    )
    raise DataError(str(source), [RowError("", "", "no such file or folder", remedy)])


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _suffixes(path: Path) -> set[str]:
    """The last suffix, with `.gz` looked through."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    return set(last)


def _read_file(path: Path) -> RowSource:
    reader = next((_FILE_READERS[suffix] for suffix in _suffixes(path) if suffix in _FILE_READERS), None)
    if reader is None:
        known = ", ".join(sorted(_FILE_READERS))
        problem = f"unknown file extension '{path.suffix}'"
        raise DataError(str(path), [RowError("", "", problem, f"Rename the file to what it is: {known} (and .gz).")])
    if path.stat().st_size == 0:
        raise DataError(str(path), [RowError("", "", "the file is empty", "Write at least one comparison into it.")])
    found = reader(path)
    if not found.rows and not found.unreadable:
        raise DataError(str(path), [RowError("", "", "holds no rows", "Write at least one comparison into it.")])
    return RowSource(str(path), *found)


def _read_parquet(path: Path) -> FileRows:
    if (fault := _parquet_frame_fault(path)) is not None:
        problem = f"is not a sound Parquet file ({fault})"
        raise DataError(str(path), [RowError("", "", problem, "Write or download it again.")])
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist(maps_as_pydicts="strict")
    except (pyarrow.ArrowException, OSError) as error:
        problem = f"is not a sound Parquet file ({str(error).splitlines()[0]})"
        raise DataError(str(path), [RowError("", "", problem, "Write or download it again.")]) from None
    return FileRows(rows, "row", list(range(1, len(rows) + 1)))


def _parquet_frame_fault(path: Path) -> str | None:
    """What a truncated or mistaken file lacks, seen without pyarrow, whose import takes longer than the answer.

    A Parquet file is PAR1, data, footer, the footer's length in four bytes (little end first), PAR1.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(4)
        stream.seek(max(size - 8, 0))
        tail = stream.read()
    if head == b"PARE":
        return "its footer is encrypted"
    if head != _PARQUET_MARK:
        return f"it begins with {head!r}, not {_PARQUET_MARK!r}"
    if size < 12 or tail[4:] != _PARQUET_MARK:
        return "it ends early"
    return "its footer is longer than the file" if int.from_bytes(tail[:4], "little") > size - 12 else None


_FILE_READERS: dict[str, Callable[[Path], FileRows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": _read_parquet,
}


def _read_folder(folder: Path, split: str | None) -> RowSource:
    """A folder saved by `datasets`, or one with data files, named after their split where there are several."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        import datasets

        loaded = _from_datasets(datasets.load_from_disk(str(folder)), split, name=str(folder))
        assert loaded is not None
        return loaded
    files = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and not _FILE_READERS.keys().isdisjoint(_suffixes(path))
    )
    if not files:
        remedy = f"Put {', '.join(sorted(_FILE_READERS))} files there, or name the file itself."
        raise DataError(str(folder), [RowError("", "", "the folder holds no data files", remedy)])
    wanted = split or DEFAULT_SPLIT
    matching = [path for path in files if re.match(rf"{re.escape(wanted)}(?![a-z0-9])", path.name.lower())]
    if not matching and split is None and len(files) == 1:
        matching = files
    if not matching:
        problem = f"no file of split '{wanted}' among {', '.join(map(str, files[:8]))}"
        raise DataError(str(folder), [RowError("", "split", problem, "Name the file itself, or another split.")])
    if len(matching) == 1:
        return _read_file(folder / matching[0])
    rows = [row for path in matching for row in read_source(folder / path).rows]
    return _in_order(str(folder), rows)


def _from_datasets(source: Any, split: str | None, name: str) -> RowSource | None:
    """The rows of a `datasets` object, or None where `source` is something else."""
    import datasets

    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        wanted = split or (DEFAULT_SPLIT if DEFAULT_SPLIT in source or len(source) > 1 else next(iter(source)))
        if wanted not in source:
            problem = f"has no split '{wanted}' (splits: {', '.join(map(str, source))})"
            raise DataError(name, [RowError("", "split", problem, "Name one of them.")])
        source = source[wanted]
    if isinstance(source, datasets.Dataset):
        return _in_order(name, source.with_format(None).to_list())
    if isinstance(source, datasets.IterableDataset):
        return _in_order(name, list(source))
    return None


def _from_hub(name: str, split: str | None) -> RowSource:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises many kinds; all of them mean that the name did not load
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"is neither a file or folder here nor a data set that the hub gave ({reason})"
        remedy = "Check the spelling, the network and HF_HUB_OFFLINE, or give the path of a file."
        raise DataError(name, [RowError("", "", problem, remedy)]) from None
    found = _from_datasets(loaded, split, name)
    assert found is not None
    return found
