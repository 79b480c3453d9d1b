"""What rows are accepted, and what becomes of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmix.data.responses import extract_prompt
from prefmix.data.schema import check_rows

GOOD = {"prompt": "Sky?", "chosen": " blue", "rejected": " green"}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@given(st.text(alphabet="ab ", max_size=8), st.text(alphabet="ab ", max_size=8))
def test_the_implicit_prompt_equals_that_of_trl(chosen: str, rejected: str):
    """Wherever TRL's answer is one: a prompt, and the same text put together again."""
    trl = pytest.importorskip("trl")
    ours = extract_prompt(chosen, rejected)
    if not chosen or not rejected:
        assert ours is None
        return
    theirs = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
    together = (theirs["prompt"] + theirs["chosen"], theirs["prompt"] + theirs["rejected"]) == (chosen, rejected)
    if theirs["prompt"] and together:
        assert ours == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
    else:
        assert ours is None or "".join(ours[:2]) == chosen


def test_an_implicit_prompt_in_messages_is_the_common_beginning():
    talk = [said("user", "Sky?"), said("assistant", "Yes?"), said("user", "Which color?")]
    rows = [{"chosen": [*talk, said("assistant", "blue")], "rejected": [*talk, said("assistant", "green")]}]
    checked = check_rows(rows)
    assert checked.form == "conversational"
    assert checked.rows[0].responses[:3] == (talk, [said("assistant", "blue")], [said("assistant", "green")])


def test_a_prompt_given_as_text_beside_whole_conversations_counts_as_implicit():
    row = {
        "prompt": "Sky?",
        "chosen": [said("user", "Sky?"), said("assistant", "blue")],
        "rejected": [said("user", "Sky?"), said("assistant", "green")],
    }
    assert check_rows([row]).rows[0].responses.prompt == [said("user", "Sky?")]


@pytest.mark.parametrize(("value", "name"), [("anna", "anna"), (7, "7"), (7.0, "7"), (None, None), ("7", "7")])
def test_users_are_named_by_text_or_whole_numbers(value: object, name: str | None):
    assert check_rows([{**GOOD, "user": value}]).rows[0].attributes.user == name


def test_ties_and_rows_of_weight_zero_are_counted_and_left_out():
    rows = [{**GOOD, "tie": True}, GOOD, {**GOOD, "weight": 0}, {**GOOD, "tie": True, "rejected": GOOD["chosen"]}]
    checked = check_rows(rows)
    assert [row.source_row for row in checked.rows] == [1]
    assert checked.dropped == {"tie": 2, "weight 0": 1}


def test_null_means_absent_and_other_columns_are_left_alone():
    optional = ("user", "group", "weight", "metadata", "tie", "label", "tools", "chat_template_kwargs")
    row = check_rows([{**GOOD, **dict.fromkeys(optional), "score": object()}]).rows[0]
    assert row.attributes == (None, None, 1.0, {}, False, None, None, {})


def test_user_fields_may_differ_between_users_and_other_fields_within_one():
    rows = [
        {**GOOD, "user": "a", "metadata": {"user_age": 1, "device": "phone"}},
        {**GOOD, "user": "a", "metadata": {"user_age": 1, "device": "desk", "user_sex": None}},
        {**GOOD, "user": "b", "metadata": {"user_age": 2}},
        {**GOOD, "metadata": {"user_age": 3}},
        {**GOOD, "metadata": {"user_age": 4}},
    ]
    assert len(check_rows(rows).rows) == 5


def test_contents_in_text_parts_and_answers_that_call_tools_are_accepted():
    row = {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Sky?"}]}],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}],
        "rejected": [said("assistant", "green")],
    }
    assert check_rows([row]).form == "conversational"
