"""Ties, soft labels and rankings: what rows may say, what is refused, and what reaches a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prefmix.data.collator import ComparisonCollator
from prefmix.data.errors import DataError
from prefmix.data.readers import read_source
from prefmix.data.schema import check_rows
from prefmix.data.tokenization import tokenize_rows
from prefmix.data.validation import validate

PAIR = {"prompt": "Sky?", "chosen": " blue", "rejected": " green"}
TIE = {**PAIR, "tie": True}
SOFT = {**PAIR, "label": 0.25}
ORDER = {"prompt": "Sky?", "ranking": [" blue", " grey", " red", " green"]}
BEST = {"prompt": "Sky?", "chosen": " grey", "rejected": [" red", " blue"]}


def _fault(row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        check_rows([PAIR, row])
    return str(caught.value)


def _texts(table, tokenizer) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in table.texts.completion_ids]


def test_ties_are_dropped_and_counted_unless_asked_for(tiny_tokenizer):
    dropped = tokenize_rows([PAIR, TIE], tiny_tokenizer)
    assert len(dropped) == 1 and dropped.dropped == {"tie": 1} and dropped.tie is None
    kept = tokenize_rows([PAIR, TIE], tiny_tokenizer, keep_ties=True)
    assert kept.tie.tolist() == [False, True] and kept.dropped == {}
    same = {**TIE, "rejected": " blue"}
    assert tokenize_rows([PAIR, same], tiny_tokenizer, keep_ties=True).dropped == {"tie": 1}  # one text, no comparison


def test_a_label_below_a_half_turns_the_row_round(tiny_tokenizer):
    table = tokenize_rows([SOFT, PAIR], tiny_tokenizer)
    texts = _texts(table, tiny_tokenizer)
    assert [texts[i] for i in table.chosen] == ["green", "blue"]
    assert [texts[i] for i in table.rejected] == ["blue", "green"]
    assert table.label.tolist() == [0.75, 1.0]
    assert tokenize_rows([PAIR], tiny_tokenizer).label is None


def test_rankings_keep_their_order_and_pairs_are_of_first_and_last(tiny_tokenizer):
    table = tokenize_rows([PAIR, ORDER, BEST], tiny_tokenizer)
    texts = _texts(table, tiny_tokenizer)
    named = [texts[i] for i in table.ranked.texts]
    assert named == ["blue", "green", "blue", "grey", "red", "green", "grey", "red", "blue"]
    assert table.ranked.size.tolist() == [2, 4, 3]
    assert table.ranked.stages.tolist() == [1, 3, 1]
    assert [texts[i] for i in table.chosen] == ["blue", "blue", "grey"]
    assert [texts[i] for i in table.rejected] == ["green", "green", "blue"]
    assert len(table.texts) == 4  # each distinct text once
    last_two = table.select(np.array([2, 1]))
    assert [texts[i] for i in last_two.ranked.texts] == ["grey", "red", "blue", "blue", "grey", "red", "green"]
    assert tokenize_rows([PAIR], tiny_tokenizer).ranked is None


def test_rankings_of_conversations(tiny_chat_tokenizer):
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    answers = [said("assistant", text) for text in ("blue", "grey", "green")]
    order = {"prompt": said("user", "Sky?"), "ranking": answers}
    best = {"prompt": said("user", "Sky?"), "chosen": answers[1], "rejected": [answers[0], answers[2]]}
    pair = {"prompt": said("user", "Sky?"), "chosen": answers[0], "rejected": answers[2]}
    table = tokenize_rows([order, best, pair], tiny_chat_tokenizer)
    assert table.ranked.size.tolist() == [3, 3, 2]
    assert table.ranked.texts[table.ranked.size.cumsum() - 1].tolist() == table.rejected.tolist()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "label": 1.5}, "row 2, 'label': is float 1.5"),
        ({**PAIR, "label": True}, "row 2, 'label': is bool True"),
        ({**PAIR, "label": "yes"}, "rename a column that means something else"),
        ({**TIE, "label": 0.5}, "row 2, 'label': is 0.5 on a tie"),
        ({**ORDER, "tie": True}, "row 2, 'tie': is given beside a ranking"),
        ({**ORDER, "label": 0.9}, "row 2, 'label': is given beside a ranking"),
        ({**ORDER, "chosen": " blue"}, "row 2, 'ranking': stands beside chosen"),
        ({"prompt": "Sky?", "ranking": [" blue"]}, "List at least two responses"),
        ({"prompt": "Sky?", "ranking": " blue"}, "row 2, 'ranking': is str"),
        ({"prompt": "Sky?", "ranking": [" a", " b", " a"]}, "holds one response twice"),
        ({"prompt": "Sky?", "ranking": [" a", 3, " b"]}, "row 2, 'ranking[1]': is int 3"),
        (
            {"prompt": "Sky?", "ranking": [" a", [{"role": "assistant", "content": "x"}], " b"]},
            "mixes text and messages",
        ),
        ({"ranking": ["Sky? a", "Sky? b"]}, "row 2, 'prompt': is missing"),
        ({**BEST, "rejected": []}, "row 2, 'rejected': is an empty list"),
        ({**BEST, "rejected": [" red", ""]}, "row 2, 'rejected[1]': is empty"),
        ({**BEST, "rejected": [" red", " grey"]}, "row 2, 'rejected': holds one response twice"),
        ({"prompt": "Sky?", "rejected": [" red", " grey"]}, "row 2, 'chosen': is null"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(row, message):
    assert message in _fault(row)


def test_batches_of_pairs_have_no_further_keys_and_those_of_rankings_are_ragged(tiny_tokenizer):
    pairs = tokenize_rows([PAIR, {**PAIR, "rejected": " red"}], tiny_tokenizer)
    batch = ComparisonCollator(pairs, group=np.arange(2), pad_token_id=0)([0, 1])
    assert not {"tie", "label", "ranked", "ranked_size"} & batch.keys()
    table = tokenize_rows([PAIR, ORDER, TIE, SOFT, BEST], tiny_tokenizer, keep_ties=True)
    batch = ComparisonCollator(table, group=np.arange(5), pad_token_id=0)([4, 1, 2])
    assert batch["tie"].tolist() == [False, False, True]
    torch.testing.assert_close(batch["label"], torch.ones(3))
    assert batch["ranked_size"].tolist() == [3, 4, 2] and batch["ranked_stages"].tolist() == [1, 3, 1]
    ids = batch["text_ids"][batch["ranked"]]
    assert ids.tolist() == table.ranked.select(np.array([4, 1, 2])).texts.tolist()
    first = batch["ranked_size"].cumsum(0) - batch["ranked_size"]
    assert torch.equal(batch["ranked"][first], batch["chosen"])


def test_csv_cells_hold_rankings_labels_and_ties(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.csv"
    path.write_text(
        "prompt,chosen,rejected,ranking,label,tie\n"
        'Sky?," blue"," green",,0.8,\n'
        'Sky?," blue","["" red"", "" green""]",,,\n'
        'Sky?," red"," green",,,true\n'
    )
    rows = read_source(path).rows
    table = tokenize_rows([{k: v for k, v in row.items() if v is not None} for row in rows], tiny_tokenizer)
    assert table.label.tolist() == pytest.approx([0.8, 1.0])
    assert table.ranked.size.tolist() == [2, 3]
    assert table.dropped == {"tie": 1}


def test_validate_counts_texts_of_rankings_and_knows_the_columns():
    report = validate([PAIR, {**ORDER, "user": "a"}, {**ORDER, "user": "a"}, SOFT])
    assert report.texts == 4 and report.duplicates == 1
    assert report.extra_columns == []
