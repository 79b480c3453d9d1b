"""One set of rows, written in every format, read back alike."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from prefmix.data.errors import DataError
from prefmix.data.readers import read_rows, read_source

ROWS = [
    {
        "prompt": "Sky?",
        "chosen": 'blue, "or so"\nyes',
        "rejected": "green\u2028",
        "user": "anna",
        "weight": 0.5,
        "note": "é",
    },
    {"prompt": "Sea?", "chosen": "wet", "rejected": "dry", "user": "bob", "weight": 1.0, "note": "x"},
]


def as_csv(rows: list[dict], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


FORMATS = {
    "a.jsonl": as_jsonl(ROWS),
    "a.ndjson": as_jsonl(ROWS),
    "bom.jsonl": b"\xef\xbb\xbf" + as_jsonl(ROWS),
    "crlf.jsonl": as_jsonl(ROWS).replace(b"\n", b"\r\n"),
    "a.jsonl.gz": gzip.compress(as_jsonl(ROWS)),
    "a.json": json.dumps(ROWS).encode(),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv": as_csv(ROWS),
    "a.csv.gz": gzip.compress(as_csv(ROWS)),
    "a.tsv": as_csv(ROWS, "\t"),
    "v1.2.jsonl": as_jsonl(ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_text_format_gives_the_same_rows_with_every_column(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(FORMATS[name])
    assert read_rows(tmp_path / name) == ROWS
    assert read_rows(str(tmp_path / name)) == ROWS


def test_parquet_and_datasets_give_the_same_rows(tmp_path: Path):
    import datasets

    write_parquet(tmp_path / "a.parquet", ROWS)
    assert read_rows(tmp_path / "a.parquet") == ROWS
    dataset = datasets.Dataset.from_list(ROWS)
    assert read_rows(dataset) == ROWS
    assert read_rows(dataset.with_format("numpy")) == ROWS
    assert read_rows(dataset.to_iterable_dataset()) == ROWS
    both = datasets.DatasetDict({"train": dataset, "test": dataset.select([1])})
    assert read_rows(both) == ROWS
    assert read_rows(both, split="test") == ROWS[1:]
    with pytest.raises(DataError, match=r"has no split 'dev' \(splits: train, test\)"):
        read_rows(both, split="dev")
    dataset.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "both")
    assert read_rows(tmp_path / "one") == ROWS
    assert read_rows(tmp_path / "both", split="test") == ROWS[1:]


def test_rows_in_memory_are_copied():
    rows = read_rows(ROWS)
    rows[0]["prompt"] = "changed"
    assert ROWS[0]["prompt"] == "Sky?"


def test_structured_cells_of_a_csv_hold_json(tmp_path: Path):
    messages = [{"role": "user", "content": "Sky?"}]
    row = {
        "prompt": json.dumps(messages),
        "metadata": '{"user_age": 3}',
        "tie": "True",
        "weight": "",
        "user": "7",
        "group": "",
    }
    (tmp_path / "a.csv").write_bytes(as_csv([row]))
    expected = {
        "prompt": messages,
        "metadata": {"user_age": 3},
        "tie": True,
        "weight": None,
        "user": "7",
        "group": None,
    }
    assert read_rows(tmp_path / "a.csv") == [expected]


def test_text_that_only_looks_like_messages_stays_text(tmp_path: Path):
    row = {"prompt": "[{not json", "chosen": "[1, 2]", "rejected": '"a"'}
    (tmp_path / "a.csv").write_bytes(as_csv([row]))
    assert read_rows(tmp_path / "a.csv") == [row]


def test_places_are_counted_as_an_editor_counts_them(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + as_jsonl(ROWS[:1]) + b"\n\n" + as_jsonl(ROWS[1:]))
    assert [read_source(tmp_path / "a.jsonl").where(i) for i in (0, 1)] == ["line 2", "line 5"]
    (tmp_path / "a.csv").write_bytes(as_csv(ROWS))  # the first record spans two lines
    assert [read_source(tmp_path / "a.csv").where(i) for i in (0, 1)] == ["line 2", "line 4"]
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS).encode())
    assert read_source(tmp_path / "a.json").where(1) == "item 2"
    assert read_source(ROWS).where(1) == "row 2"


def test_a_folder_gives_the_files_of_its_split(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00002.jsonl").write_bytes(as_jsonl(ROWS[:1]))
    (tmp_path / "data" / "train-00001-of-00002.jsonl").write_bytes(as_jsonl(ROWS[1:]))
    (tmp_path / "test.csv").write_bytes(as_csv(ROWS[1:]))
    (tmp_path / "README.md").write_text("not data")
    assert read_rows(tmp_path) == ROWS
    assert read_rows(tmp_path, split="test") == ROWS[1:]
    with pytest.raises(DataError, match="no file of split 'dev' among"):
        read_rows(tmp_path, split="dev")


def test_a_single_file_needs_no_name_of_a_split(tmp_path: Path):
    (tmp_path / "votes.jsonl").write_bytes(as_jsonl(ROWS))
    assert read_rows(tmp_path) == ROWS
    with pytest.raises(DataError, match="no file of split 'test'"):
        read_rows(tmp_path, split="test")


def test_a_name_that_the_hub_does_not_give_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def refuse(name: str) -> None:
        raise ConnectionError(f"cannot reach {name}\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"someone/votes: is neither .*\(cannot reach someone/votes\)\. Check the spelling"
    ):
        read_rows("someone/votes")


def test_a_hub_name_is_loaded_with_its_split(monkeypatch: pytest.MonkeyPatch):
    import datasets

    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[1:])}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: both)
    assert read_rows("someone/votes") == ROWS
    assert read_rows("someone/votes", split="test") == ROWS[1:]
