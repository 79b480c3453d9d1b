"""Counts of a report against rows counted by hand."""

from __future__ import annotations

import json

import pytest

from prefmix.data.errors import DataError
from prefmix.data.validation import validate

A, B, C = " blue", " green", " red"


def row(chosen: str, rejected: str, **more: object) -> dict[str, object]:
    return {"prompt": "Sky?", "chosen": chosen, "rejected": rejected, **more}


def test_the_report_counts_what_is_there():
    rows = [
        row(A, B, user="anna", group="g", metadata={"user_age": 3}, note=1),
        row(A, B, user="anna", metadata={"user_age": 3, "device": "phone"}),  # a duplicate
        row(B, A, user="anna", metadata={"user_age": 3}),  # and the opposite
        row(A, C, user="bob", weight=2.0),
        row(A, C, weight=0.5),
        row(A, C),  # nobody named: not a duplicate
        row(A, B, user="carl", tie=True),
        row(A, B, user="carl", weight=0),
    ]
    report = validate(rows).to_dict()
    assert json.loads(json.dumps(report)) == report
    assert report == {
        "source": "rows",
        "rows": 8,
        "kept": 6,
        "dropped": {"tie": 1, "weight 0": 1},
        "form": "standard",
        "implicit_prompt": False,
        "prompts": 1,
        "texts": 3,
        "duplicates": 1,
        "contradictions": 1,
        "both_directions": 1,
        "users": 2,
        "rows_without_user": 2,
        "rows_per_user_median": 2.0,
        "rows_per_user_max": 3,
        "users_with_one_row": 1,
        "groups": 1,
        "weight_min": 0.5,
        "weight_max": 2.0,
        "metadata_fields": {"user_age": 3, "device": 1},
        "extra_columns": ["note"],
        "unread_users": None,
    }


def test_conversations_implicit_prompts_and_token_ids_are_told_apart():
    def talk(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": answer}]

    report = validate([{"chosen": talk(A), "rejected": talk(B)}])
    assert (report.form, report.implicit_prompt, report.prompts, report.texts) == ("conversational", True, 1, 2)
    report = validate([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    assert (report.form, report.implicit_prompt, report.texts, report.users) == ("tokenized", False, 2, 0)
    assert report.rows_per_user_median == 0


@pytest.mark.parametrize("column", ["annotator_id", "Worker-ID", "users", "usr", "uesr", "User"])
def test_a_column_that_looks_like_who_judged_is_named_and_not_read(column: str):
    report = validate([row(A, B, **{column: name, "note": 1}) for name in ("anna", "bob", "anna", None)])
    assert report.unread_users == (
        f"column {column!r} (2 values) looks like who judged; rename it to 'user' (datasets: "
        f"data.rename_column({column!r}, 'user'); on the command line: --user_column {column}), or users cannot be "
        "told apart"
    )
    assert report.users == 0 and column in report.extra_columns


def test_a_column_that_is_named_says_who_judged_and_one_that_no_row_has_is_refused():
    rows = [row(A, B, annotator_id=name, user="somebody") for name in ("anna", "bob", "anna", None)]
    report = validate(rows, user_column="annotator_id")
    assert (report.users, report.rows_without_user, report.extra_columns, report.unread_users) == (2, 1, [], None)
    with pytest.raises(DataError, match="'anotator_id': no row has this column .* Name 'annotator_id'"):
        validate(rows, user_column="anotator_id")


@pytest.mark.parametrize("more", [{"user": "anna", "annotator_id": "x"}, {"source": "web"}, {"annotator_id": None}])
def test_nothing_is_said_where_users_are_named_or_nothing_looks_like_them(more: dict[str, object]):
    assert validate([row(A, B, **more)]).unread_users is None
