"""Token ids against TRL's own code on the same rows, and what the table of distinct texts says about them."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from prefmix.data.errors import DataError
from prefmix.data.tokenization import PROMPT_TOO_LONG, tokenize_rows, tokenize_texts


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


STANDARD = [
    {"prompt": "What color is the sky?", "chosen": " It is blue.", "rejected": " It is green, as everybody knows."},
    {"prompt": "Where is the sun?", "chosen": " In the sky.<eos>", "rejected": " In the sea."},
    # The prompt ends inside what becomes one token with the response: the completion starts earlier.
    {"prompt": "The fi", "chosen": "lm was great.", "rejected": "lms were bad."},
    {
        "prompt": "Once upon a time there was a little girl who lived in a small house. " * 2,
        "chosen": "Yes",
        "rejected": "No",
    },
]
IMPLICIT = [
    {"chosen": "Q: is it? A: Yes, it is.", "rejected": "Q: is it? A: No, it is not."},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "The sky is blue. ", "rejected": "The sky is blue. Yes."},
]
CONVERSATIONAL = [
    {
        "prompt": [said("system", "Be brief."), said("user", "What color is the sky?")],
        "chosen": [said("assistant", "It is blue.")],
        "rejected": [said("assistant", "It is green.")],
    },
    {
        "prompt": [said("user", "Where is the sun?"), said("assistant", "In the sea."), said("user", "No.")],
        "chosen": [said("assistant", "In the sky."), said("user", "Yes."), said("assistant", "It is.")],
        "rejected": [said("assistant", "It is not.")],
    },
]
IMPLICIT_CONVERSATIONAL = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CONVERSATIONAL
]
WITH_ARGUMENTS = [{**row, "chat_template_kwargs": {"enable_thinking": False}} for row in CONVERSATIONAL]
WITH_TOOLS = [{**row, "tools": '[{"name": "look", "description": "at the sky"}]'} for row in CONVERSATIONAL]

ROWS = {
    "standard": STANDARD,
    "implicit": IMPLICIT,
    "conversational": CONVERSATIONAL,
    "implicit conversational": IMPLICIT_CONVERSATIONAL,
    "template arguments": WITH_ARGUMENTS,
    "tools": WITH_TOOLS,
}


def trl_sequences(rows, tokenizer, max_length, mode):
    """(input ids, completion mask shifted as TRL's loss shifts it) of chosen and rejected, from TRL's own code."""
    pytest.importorskip("trl")
    import datasets
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=mode)
    rows = datasets.Dataset.from_list(rows)
    prepared = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
    found = []
    for row in prepared:
        batch = collator([row])
        for side in range(2):
            length = int(batch["attention_mask"][side].sum())
            ids, mask = batch["input_ids"][side, :length].tolist(), batch["completion_mask"][side, :length].tolist()
            found.append((ids, [0, *mask[1:]]))  # the loss drops the first position: nothing predicts it
    return found


def our_sequences(table):
    found = []
    for pair in zip(table.chosen, table.rejected, strict=True):
        for text in pair:
            prompt, completion = table.texts.prompt_ids[text], table.texts.completion_ids[text]
            assert prompt and completion
            found.append((list(prompt) + list(completion), [0] * len(prompt) + [1] * len(completion)))
    return found


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    ("max_length", "mode"),
    [(None, "keep_start"), (1024, "keep_start"), (24, "keep_start"), (24, "keep_end"), (7, "keep_end")],
)
def test_token_ids_equal_those_of_trl(kind, max_length, mode, tiny_tokenizer, tiny_chat_tokenizer):
    rows = ROWS[kind]
    tokenizer = tiny_tokenizer if isinstance(rows[0]["chosen"], str) else tiny_chat_tokenizer
    expected = trl_sequences(rows, tokenizer, max_length, mode)
    if not expected:
        with pytest.raises(DataError, match="no row is left"):
            tokenize_rows(rows, tokenizer, max_length=max_length, truncation_mode=mode)
        return
    table = tokenize_rows(rows, tokenizer, max_length=max_length, truncation_mode=mode)
    assert our_sequences(table) == expected
    assert table.dropped.get(PROMPT_TOO_LONG, 0) == len(rows) - len(expected) // 2


def test_a_special_token_that_the_tokenizer_adds_stands_once_at_the_start(tiny_tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    table = tokenize_rows(STANDARD, tokenizer)
    assert our_sequences(table) == trl_sequences(STANDARD, tokenizer, 1024, "keep_start")
    assert all(ids[0] == 2 for ids in table.texts.prompt_ids)


def test_a_prompt_that_parts_from_its_continuation_is_warned_of(tiny_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        tokenize_rows(STANDARD, tiny_tokenizer)
    assert "In 1 of 4 rows" in caplog.text


def test_rows_that_are_tokenized_already_are_used_as_they_are(tiny_tokenizer):
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}]
    table = tokenize_rows(rows, tiny_tokenizer)
    assert our_sequences(table) == [([5, 6, 7], [0, 0, 1]), ([5, 6, 8, 9], [0, 0, 1, 1])]


def test_every_distinct_text_stands_once_and_prompts_are_shared(tiny_tokenizer):
    answers = [" blue", " green", " red"]
    rows = [
        {"prompt": "Sky?", "chosen": a, "rejected": b, "user": user}
        for user in ("anna", 7)
        for a in answers
        for b in answers
        if a != b
    ]
    rows.append({"prompt": "Sea?", "chosen": " blue", "rejected": " green"})
    table = tokenize_rows(rows, tiny_tokenizer)
    assert len(table) == 13
    assert len(table.texts) == 5  # three under one prompt, two under the other
    assert len(table.texts.prompts) == 2
    assert table.users == ("anna", "7")
    assert table.user.tolist() == [0] * 6 + [1] * 6 + [-1]
    assert table.prompt.tolist() == [0] * 12 + [1]
    for text, prompt in enumerate(table.texts.prompt_index):
        assert table.texts.prompt_ids[text] == table.texts.prompts[prompt]


def test_the_same_tokens_with_another_start_of_the_completion_are_two_texts(tiny_tokenizer):
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]},
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8], "rejected_ids": [9]},
    ]
    assert len(tokenize_rows(rows, tiny_tokenizer).texts) == 4


def test_a_text_without_context_gives_its_first_token_up(tiny_tokenizer):
    rows = [{"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}]
    table = tokenize_rows(rows, tiny_tokenizer)
    assert our_sequences(table) == [([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])]
    assert table.texts.prompts == [[tiny_tokenizer.eos_token_id]]
    with pytest.raises(DataError, match="row 1, 'rejected': has no token that anything predicts"):
        tokenize_rows([{"prompt_ids": [], "chosen_ids": [5, 6], "rejected_ids": [8]}], tiny_tokenizer)


def test_keep_end_leaves_both_responses_under_one_prompt(tiny_tokenizer):
    table = tokenize_rows(STANDARD[:1], tiny_tokenizer, max_length=8, truncation_mode="keep_end")
    assert table.texts.prompt_index.tolist() == [0, 0]


def test_users_weights_groups_metadata_and_source_rows_follow_their_row(tiny_tokenizer):
    row = {"prompt": "Sky?", "chosen": " blue", "rejected": " green"}
    rows = [
        {**row, "user": "b", "group": "two", "weight": 0.5, "metadata": {"user_age": 3}, "note": "kept by the reader"},
        {**row, "tie": True},
        {**row, "weight": 0},
        {**row, "user": "a", "group": "one"},
        {**row},
    ]
    table = tokenize_rows(rows, tiny_tokenizer, users=["a", "unseen"], groups=["two"])
    assert table.users == ("a", "unseen", "b")
    assert table.user.tolist() == [2, 0, -1]
    assert table.groups == ("two", "one")
    assert table.group.tolist() == [0, 1, -1]
    assert table.weight.tolist() == [0.5, 1.0, 1.0]
    assert table.weight.dtype == np.float32
    assert table.source_row.tolist() == [0, 3, 4]
    assert table.metadata == [{"user_age": 3}, {}, {}]
    assert table.dropped == {"tie": 1, "weight 0": 1}


def test_responses_that_truncation_made_equal_are_warned_of(tiny_tokenizer, caplog):
    rows = [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [6, 8]}]
    with caplog.at_level(logging.WARNING):
        table = tokenize_rows(rows, tiny_tokenizer, max_length=2)
    assert table.chosen.tolist() == table.rejected.tolist()
    assert "1 of 1 rows have equal responses after truncation" in caplog.text


def test_a_conversation_needs_a_chat_template_and_plain_text_an_end_token(tiny_tokenizer):
    from copy import deepcopy

    with pytest.raises(DataError, match="line 5, 'prompt': is a conversation, but the tokenizer has no chat template"):
        tokenize_rows(CONVERSATIONAL, tiny_tokenizer, where=lambda index: f"line {index + 5}")
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"eos_token is None.*Set `tokenizer.eos_token`"):
        tokenize_rows(STANDARD, tokenizer)


def test_texts_for_scoring_keep_their_order_and_equal_the_texts_of_rows(tiny_tokenizer, tiny_chat_tokenizer):
    pairs = [("Sky?", " blue"), ("Sky?", " green"), ("Sky?", " blue")]
    texts = tokenize_texts(pairs, tiny_tokenizer)
    rows = tokenize_rows([{"prompt": "Sky?", "chosen": " blue", "rejected": " green"}], tiny_tokenizer)
    assert texts.completion_ids == [rows.texts.completion_ids[i] for i in (0, 1, 0)]
    assert texts.prompt_index.tolist() == [0, 0, 0]

    prompt = CONVERSATIONAL[0]["prompt"]
    chat = tokenize_texts([(prompt, "It is blue."), (prompt, [said("assistant", "It is green.")])], tiny_chat_tokenizer)
    rows = tokenize_rows(CONVERSATIONAL[:1], tiny_chat_tokenizer)
    assert chat.completion_ids == rows.texts.completion_ids
    assert chat.prompt_ids == rows.texts.prompt_ids
    with pytest.raises(DataError, match="row 1, 'response': nothing of the response is left within max_length=2"):
        tokenize_texts([(prompt, "It is blue.")], tiny_chat_tokenizer, max_length=2)
