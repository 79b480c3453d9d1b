"""A prompt to be answered has the token ids that it had in training."""

from __future__ import annotations

import pytest

from prefmix.data.tokenization import tokenize_texts
from prefmix.policy.prompts import is_single_prompt, prompt_list, prompt_token_ids

MESSAGES = [{"role": "user", "content": "Where is the sun?"}]


def test_token_ids_are_those_of_training(tiny_tokenizer, tiny_chat_tokenizer):
    for tokenizer, prompt in ((tiny_tokenizer, "Where is the sun?"), (tiny_chat_tokenizer, MESSAGES)):
        texts = tokenize_texts([(prompt, " In the sky.")], tokenizer)
        assert prompt_token_ids(prompt, tokenizer) == list(texts.prompt_ids[0])


def test_an_empty_prompt_is_the_token_that_ends_texts(tiny_tokenizer):
    assert prompt_token_ids("", tiny_tokenizer) == [tiny_tokenizer.eos_token_id]


def test_one_prompt_or_several():
    assert is_single_prompt("text") and is_single_prompt(MESSAGES)
    assert not is_single_prompt(["text"]) and not is_single_prompt([MESSAGES])
    assert prompt_list(MESSAGES) == [MESSAGES] and prompt_list([MESSAGES, "text"]) == [MESSAGES, "text"]
    with pytest.raises(ValueError, match="prompt="):
        prompt_list([])
