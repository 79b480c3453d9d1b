"""Malformed input: each mistake is named with its place, its field, its value and a remedy, before torch is loaded."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from prefmix.data.errors import DataError
from prefmix.data.readers import read_source
from prefmix.data.validation import validate

GOOD = {"prompt": "Sky?", "chosen": " blue", "rejected": " green", "user": "anna"}


def said(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


TALK = {
    "prompt": [said("user", "Sky?")],
    "chosen": [said("assistant", "blue")],
    "rejected": [said("assistant", "green")],
}


def jsonl(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def row(**changes: object) -> bytes:
    """Two good rows, then one with changes: the mistake stands on line 3."""
    return jsonl(GOOD, GOOD, {**GOOD, **changes})


def talk(**changes: object) -> bytes:
    return jsonl(TALK, TALK, {**TALK, **changes})


def without(column: str) -> bytes:
    return jsonl(GOOD, GOOD, {key: value for key, value in GOOD.items() if key != column})


class Case(NamedTuple):
    """A file and the parts of the message that a reader needs, in this order."""

    content: bytes
    expected: tuple[str, ...]
    name: str = "data.jsonl"


CASES = {
    # --- files -----------------------------------------------------------------------------------------------------
    "empty file": Case(b"", ("the file is empty", "Write at least one comparison")),
    "only blank lines": Case(b"\n \n", ("holds no rows", "Write at least one comparison")),
    "unknown extension": Case(b"x", ("unknown file extension '.txt'", "Rename", ".jsonl"), "data.txt"),
    "not JSON": Case(jsonl(GOOD, GOOD, b"{oops"), ("line 3", "is not JSON", "column 2", "one JSON object a line")),
    "array in jsonl": Case(json.dumps([GOOD], indent=1).encode(), ("line 1", "not JSON", "file named .json")),
    "a number on a line": Case(jsonl(GOOD, 7), ("line 2", "is int 7, not an object", "one JSON object a line")),
    "duplicate key": Case(
        jsonl(GOOD, b'{"chosen": "a", "chosen": "b", "rejected": "c"}'), ("line 2", "'chosen' stands twice", "Keep one")
    ),
    "deeply nested": Case(jsonl(GOOD, b"[" * 200_000), ("line 2", "nested too deeply", "Flatten")),
    "not UTF-8": Case(jsonl(GOOD) + b'{"prompt": "caf\xe9"}\n', ("line 2", "is not UTF-8 (byte 0xe9", "as UTF-8")),
    "truncated gzip": Case(gzip.compress(row())[:-9], ("the gzip file ends early", "download it again"), "d.jsonl.gz"),
    "not gzip": Case(row(), ("not a sound gzip file", "download it again"), "data.jsonl.gz"),
    "json array of texts": Case(json.dumps([GOOD, "b"]).encode(), ("item 2", "is str 'b', not an object"), "data.json"),
    "json object": Case(b'{"chosen": ["a"]}', ("is a JSON dict, not an array", "Write an array"), "data.json"),
    "jsonl named json": Case(
        jsonl(GOOD, GOOD), ("line 2", "not JSON: Extra data", "name the file .jsonl"), "data.json"
    ),
    "csv columns": Case(
        b"prompt,chosen,rejected\nSky?,blue,green\nSky?,blue, or so,green\n",
        ("line 3", "has 4 columns, the header has 3 (prompt, chosen, rejected)", "in quotes"),
        "data.csv",
    ),
    "csv open quote": Case(
        b'prompt,chosen,rejected\nSky?,"blue,green\n', ("line 2", "is not CSV", "Close the quotes"), "data.csv"
    ),
    "csv double column": Case(
        b"prompt,chosen,chosen\na,b,c\n", ("line 1", "'chosen'", "stands twice in the header", "Rename"), "data.csv"
    ),
    "csv weight": Case(
        b'prompt,chosen,rejected,weight\nSky?,"blue\nor so",green,1\nSky?,blue,green,much\n',
        ("line 4", "'weight'", "is str 'much', not a number", "Write a number"),
        "data.csv",
    ),
    "csv not UTF-8": Case(
        b"prompt,chosen,rejected\ncaf\xe9,b,c\n", ("line 2", "is not UTF-8", "Save the file as UTF-8"), "data.csv"
    ),
    "broken parquet": Case(
        b"PAR1 no", ("not a sound Parquet file", "ends early", "Write or download it again"), "data.parquet"
    ),
    "text named parquet": Case(jsonl(GOOD), ("it begins with b'{\"pr'", "Write or download it again"), "data.parquet"),
    "parquet without its footer": Case(
        b"PAR1 data " + (999).to_bytes(4, "little") + b"PAR1", ("footer is longer than the file",), "data.parquet"
    ),
    "parquet with a damaged footer": Case(
        b"PAR1 data " + (4).to_bytes(4, "little") + b"PAR1", ("not a sound Parquet file", "again"), "data.parquet"
    ),
    # --- columns ---------------------------------------------------------------------------------------------------
    "no chosen column": Case(
        jsonl({"prompt": "a", "preferred": "b", "rejected": "c"}),
        ("'chosen'", "column is missing in every row", "Columns found: prompt, preferred, rejected"),
    ),
    "missing chosen": Case(without("chosen"), ("line 3", "'chosen'", "is missing", "the preferred response as text")),
    "missing rejected": Case(without("rejected"), ("line 3", "'rejected'", "is missing", "the other response")),
    "missing prompt": Case(without("prompt"), ("line 3", "'prompt'", "share no beginning", "Add a 'prompt' column")),
    "prompt in some rows": Case(
        jsonl(GOOD, {"chosen": "Sky? a", "rejected": "Sky? b"}),
        ("line 2", "'prompt'", "is missing here but not in line 1", "Give every row a prompt, or none"),
    ),
    "null prompt": Case(row(prompt=None), ("line 3", "'prompt'", "is null", "leave the column out")),
    "null chosen": Case(row(chosen=None), ("line 3", "'chosen'", "is null", "the preferred response as text")),
    "a number as text": Case(row(rejected=42), ("line 3", "'rejected'", "is int 42, not text", "in quotes")),
    "empty completion": Case(row(chosen=""), ("line 3", "'chosen'", "is empty", "Remove the row")),
    "equal pair": Case(row(rejected=" blue"), ("line 3", "'rejected'", "equals 'chosen': ' blue'", "`tie: true`")),
    "nothing but ties": Case(jsonl({**GOOD, "tie": True}), ("no row is left: 1 x tie", "Add rows with a preference")),
    "tie as text": Case(row(tie="equal"), ("line 3", "'tie'", "is str 'equal'", "Write true, false or nothing")),
    "images": Case(row(images=["a.png"]), ("line 3", "'images'", "not supported", "only text")),
    # --- attributes ------------------------------------------------------------------------------------------------
    "weight NaN": Case(row(weight=float("nan")), ("line 3", "'weight'", "is nan", "Write a finite number")),
    "weight infinite": Case(row(weight=float("inf")), ("line 3", "'weight'", "is inf", "Write a finite number")),
    "weight negative": Case(
        row(weight=-1), ("line 3", "'weight'", "is -1.0, negative", "swap 'chosen' and 'rejected'")
    ),
    "weight text": Case(row(weight="2"), ("line 3", "'weight'", "is str '2', not a number", "Write a number")),
    "user a list": Case(row(user=["anna"]), ("line 3", "'user'", "is list ['anna']", "by text or by a whole number")),
    "user empty": Case(row(user=" "), ("line 3", "'user'", "is empty text ' '", "leave the field out")),
    "user true": Case(row(user=True), ("line 3", "'user'", "is bool True", "by text or by a whole number")),
    "group a fraction": Case(row(group=1.5), ("line 3", "'group'", "is float 1.5", "by text or by a whole number")),
    "metadata a list": Case(row(metadata=[1]), ("line 3", "'metadata'", "is list [1], not a mapping", '{"user_age"')),
    "metadata nested": Case(row(metadata={"a": {}}), ("line 3", "'metadata.a'", "is dict {}", "a field of its own")),
    "metadata NaN": Case(row(metadata={"a": float("nan")}), ("line 3", "'metadata.a'", "is nan", "or null")),
    "user field changes": Case(
        jsonl({**GOOD, "metadata": {"user_age": 31}}, {**GOOD, "metadata": {"user_age": 32}}),
        ("line 2", "'metadata.user_age'", "is 32 for user 'anna' but was 31 in line 1", "constant within a user"),
    ),
    # --- conversations ---------------------------------------------------------------------------------------------
    "no role": Case(talk(chosen=[{"content": "a"}]), ("line 3", "'chosen[0]'", "has no 'role'", "Add 'role'")),
    "sharegpt keys": Case(
        talk(prompt=[{"from": "human", "value": "a"}]), ("line 3", "'prompt[0]'", "has no 'role'", "Rename 'from'")
    ),
    "role a number": Case(talk(chosen=[said(3, "a")]), ("line 3", "'chosen[0]'", "role is 3", "Use 'system'")),  # type: ignore[arg-type]
    "role of another tool": Case(
        talk(prompt=[said("human", "a")]), ("line 3", "'prompt[0]'", "role 'human' is unknown", "Rename it to 'user'")
    ),
    "role mistyped": Case(
        talk(prompt=[said("usr", "a")]), ("line 3", "'prompt[0]'", "role 'usr' is unknown", "Write 'user'")
    ),
    "role in capitals": Case(
        talk(chosen=[said("Assistant", "a")]), ("line 3", "'chosen[0]'", "role 'Assistant'", "Write 'assistant'")
    ),
    "content a number": Case(
        talk(prompt=[said("user", 5)]), ("line 3", "'prompt[0]'", "content is int 5, not text", "Write the content")
    ),
    "message a text": Case(talk(chosen=["a"]), ("line 3", "'chosen[0]'", "is str 'a', not a message", "Write {'role'")),
    "no messages": Case(talk(rejected=[]), ("line 3", "'rejected'", "an empty list of messages", "at least one")),
    "empty answer": Case(talk(chosen=[said("assistant", "")]), ("line 3", "'chosen[0]'", "is empty", "Remove the row")),
    "ends with the user": Case(
        talk(chosen=[said("user", "blue")]), ("line 3", "'chosen'", "role 'user'", "End both responses with an 'assist")
    ),
    "text beside messages": Case(talk(rejected="green"), ("line 3", "'rejected'", "differ in kind", "Use one kind")),
    "messages before text": Case(
        row(prompt=[said("user", "a")]), ("line 3", "'prompt'", "list of messages but the responses are text", "Write")
    ),
    "mixed rows": Case(
        jsonl(GOOD, TALK), ("line 2", "'chosen'", "is conversational while line 1 is standard", "in all rows")
    ),
    "template arguments": Case(
        talk(chat_template_kwargs=["a"]), ("line 3", "'chat_template_kwargs'", "is list ['a'], not a mapping", "Write")
    ),
    "tools not JSON": Case(talk(tools="look"), ("line 3", "'tools'", "text that is not JSON", "list of tool")),
    "tools a mapping": Case(
        talk(tools={"a": 1}), ("line 3", "'tools'", "is dict {'a': 1}, not a list", "list of tool")
    ),
    # --- token ids -------------------------------------------------------------------------------------------------
    "token ids as text": Case(
        jsonl({"prompt_ids": [1], "chosen_ids": "23", "rejected_ids": [4]}),
        ("line 1", "'chosen_ids'", "is '23', not a list of token ids", "Give all of prompt_ids, chosen_ids"),
    ),
    "token ids empty": Case(
        jsonl({"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [4]}),
        ("line 1", "'chosen_ids'", "is empty", "Remove"),
    ),
    "token ids equal": Case(
        jsonl({"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [4]}),
        ("line 1", "'rejected_ids'", "equals 'chosen_ids'", "Remove"),
    ),
}


def assert_in_order(message: str, parts: tuple[str, ...]) -> None:
    position = 0
    for part in parts:
        found = message.find(part, position)
        assert found >= 0, f"{part!r} is not (or not in this order) in: {message}"
        position = found + len(part)


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_place_field_value_and_remedy(name: str, tmp_path: Path):
    case = CASES[name]
    path = tmp_path / case.name
    path.write_bytes(case.content)
    with pytest.raises(DataError) as caught:
        validate(path)
    assert len(caught.value.errors) == 1, str(caught.value)
    assert_in_order(str(caught.value), (str(path), *case.expected))


def test_a_missing_file_is_named_with_its_neighbour(tmp_path: Path):
    (tmp_path / "train.jsonl").write_bytes(row())
    with pytest.raises(DataError) as caught:
        validate(str(tmp_path / "trian.jsonl"))
    assert_in_order(str(caught.value), ("trian.jsonl", "no such file or folder", "Did you mean train.jsonl?"))


def test_a_folder_without_data_says_what_it_looks_for(tmp_path: Path):
    (tmp_path / "notes.md").write_text("nothing here")
    with pytest.raises(DataError) as caught:
        validate(tmp_path)
    assert_in_order(str(caught.value), (str(tmp_path), "holds no data files", "Put", ".jsonl"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (lambda: [GOOD, "text"], ("row 2", "is str, not a mapping", "Write {column: value}")),
        (list, ("holds no rows", "Add at least one comparison")),
        (lambda: {"chosen": ["a"]}, ("is one mapping, not a list of rows", "Dataset.from_dict")),
        (lambda: [GOOD, {**GOOD, "weight": -2}], ("row 2", "'weight'", "is -2.0, negative", "Write 0 or more")),
    ],
)
def test_rows_in_memory_are_checked_alike(rows: Callable[[], object], expected: tuple[str, ...]):
    with pytest.raises(DataError) as caught:
        validate(rows())  # type: ignore[arg-type]
    assert_in_order(str(caught.value), expected)


def test_all_errors_are_found_ten_are_shown_and_the_rest_counted(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(GOOD, *[{**GOOD, "weight": -1, "user": ""} for _ in range(20)]))
    with pytest.raises(DataError) as caught:
        validate(path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("40 errors")
    assert len(lines) == 12
    assert lines[-1].strip() == "... and 30 more"
    assert len(caught.value.to_dict()["errors"]) == 40
    assert caught.value.errors[-1].where == "line 21"


def test_all_lines_that_are_not_json_are_found(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(b"{", GOOD, b"}", b""))
    with pytest.raises(DataError) as caught:
        validate(path)
    assert [error.where for error in caught.value.errors] == ["line 1", "line 3"]


def test_lines_that_are_no_rows_do_not_hide_the_mistakes_of_the_others(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(GOOD, b"{", {**GOOD, "weight": -1}, b"[1]", *[b"}"] * 20))
    with pytest.raises(DataError) as caught:
        validate(path)
    assert [error.where for error in caught.value.errors][:4] == ["line 2", "line 3", "line 4", "line 5"]
    assert caught.value.errors[1].field == "weight"
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("23 errors") and lines[-1].strip() == "... and 13 more"
    with pytest.raises(DataError, match="22 errors"):
        read_source(path)


def test_records_that_are_not_csv_do_not_hide_each_other(tmp_path: Path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'prompt,chosen,rejected,weight\na,b\na,"b"x,c,1\na,b,c,-1\na,b,c,1\nx,"never closed,c,1\n')
    with pytest.raises(DataError) as caught:
        validate(path)
    assert [error.where for error in caught.value.errors] == ["line 2", "line 3", "line 4", "line 6"]


def test_text_files_are_validated_without_anything_heavy(tmp_path: Path):
    for name, content in {
        "good.jsonl": row(),
        "bad.jsonl": row(weight=-1),
        "good.json": json.dumps([GOOD]).encode(),
        "good.csv": b"prompt,chosen,rejected\na,b,c\n",
        "bad.parquet": b"PAR1 and then nothing more",
    }.items():
        (tmp_path / name).write_bytes(content)
    program = (
        "import sys\n"
        "from prefmix.data.validation import validate\n"
        "for name in ('good.jsonl', 'bad.jsonl', 'good.json', 'good.csv', 'bad.parquet', 'none.jsonl'):\n"
        "    try:\n"
        "        validate(name)\n"
        "    except ValueError as error:\n"
        "        print(name, 'refused')\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'pandas', 'trl'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["bad.jsonl refused", "bad.parquet refused", "none.jsonl refused", "heavy []"]
