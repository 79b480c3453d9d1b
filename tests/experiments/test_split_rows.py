"""Parts share no row, no new person, and no text or prompt where they must not."""

from __future__ import annotations

import pytest
from tests.experiments.conftest import opposed_rows

from prefmix.experiments.compare_settings import SplitBy
from prefmix.experiments.split_rows import split_rows, validation_part

ROWS = [
    row | {"prompt": f"prompt {index % 15}"}
    for index, row in enumerate(opposed_rows(num_users=20, per_user=12, num_texts=8))
]


@pytest.mark.parametrize("by", ["row", "text", "prompt"])
def test_no_two_parts_share_what_they_must_not(by: SplitBy) -> None:
    split = split_rows(ROWS, by=by, test_share=0.4, validation_share=0.25, new_user_share=0.3, seed=3)
    parts = [[ROWS[i] for i in part] for part in split[:4]]
    indices = [index for part in split[:4] for index in part]
    assert len(indices) == len(set(indices)) and len(indices) + split.dropped == len(ROWS)
    assert (by == "row") == (split.dropped == 0)
    known = {row["user"] for part in parts[:3] for row in part}
    assert parts[3] and known.isdisjoint(row["user"] for row in parts[3])
    if by == "row":
        return
    train, validation = (_units(part, by) for part in parts[:2])
    tested = _units(parts[2] + parts[3], by)
    assert not train & validation and not train & tested and not validation & tested


def test_everybody_keeps_a_training_row_and_shares_come_out_right() -> None:
    split = split_rows(ROWS, test_share=0.3, validation_share=0.2, new_user_share=0.0, seed=1)
    assert {ROWS[i]["user"] for i in split.train} == {row["user"] for row in ROWS} and split.new_users == []
    assert len(split.test) / len(ROWS) == pytest.approx(0.3, abs=0.05)
    assert split == split_rows(ROWS, test_share=0.3, validation_share=0.2, new_user_share=0.0, seed=1)
    assert split != split_rows(ROWS, test_share=0.3, validation_share=0.2, new_user_share=0.0, seed=2)


def test_validation_alone_and_parts_that_come_out_empty() -> None:
    train, validation, dropped = validation_part(ROWS, by="row", share=0.25, seed=0)
    assert not set(train) & set(validation) and dropped == 0 and len(train) + len(validation) == len(ROWS)
    with pytest.raises(ValueError, match="no row is left for"):
        split_rows(ROWS[:3], test_share=0.0)
    with pytest.raises(ValueError, match="choose one of row, text, prompt"):
        split_rows(ROWS, by="user")  # type: ignore[arg-type]


def _units(rows: list[dict], by: str) -> set[str]:
    if by == "prompt":
        return {row["prompt"] for row in rows}
    return {row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")}
