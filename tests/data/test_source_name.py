"""Rows are called as their reader would find them again, and nothing is made up for rows without a name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import datasets.arrow_writer
import pytest

from prefmix.data.source_name import source_name

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("source", ["convarg", "owner/people", Path("rows.jsonl")])
def test_names_and_paths_are_themselves(source: str | Path) -> None:
    assert source_name(source) == str(source)


def test_rows_in_memory_have_none() -> None:
    assert source_name([ROW]) == source_name(datasets.Dataset.from_list([ROW])) == ""


def test_a_file_read_by_datasets_has_the_fingerprint_of_its_rows(tmp_path: Path) -> None:
    names = []
    for text in ("b", "b", "d"):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(ROW | {"chosen": text}) + "\n")
        os.utime(file, (0, ord(text)))  # `datasets` knows a file by its time and length
        read = datasets.load_dataset("json", data_files=str(file), cache_dir=str(tmp_path / "cache"))
        names.append(source_name(read["train"]))
        assert source_name(read) == names[-1] == f"json (fingerprint {read['train']._fingerprint}), train"
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("config", ["default", "tastes"])
def test_the_hubs_sets_have_owner_configuration_and_split(tmp_path: Path, config: str) -> None:
    folder = tmp_path / "owner___people" / config / "0.0.0" / "0123456789abcdef"
    folder.mkdir(parents=True)
    info = datasets.DatasetInfo(dataset_name="people", config_name=config)
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "people-train.arrow")) as writer:
        writer.write(ROW)
        writer.finalize()
    rows = datasets.Dataset.from_file(str(folder / "people-train.arrow"), info=info, split="train")
    configured = " (tastes)" if config == "tastes" else ""
    assert source_name(rows) == source_name(rows.select([0])) == f"owner/people{configured}, train"
