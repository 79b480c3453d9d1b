"""Pieces joined are the decoded text, and no piece ends within a character."""

from __future__ import annotations

import pytest

from prefmix.policy.streaming import TextStream, decode_response

TEXTS = ["The sky is blue.", "naïve café", "日本語 and 🙂🙃", "  two  spaces\n\nand lines ", "👩‍👩‍👧 family"]


def pieces_of(tokenizer, token_ids):
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in token_ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tiny_tokenizer, text):
    token_ids = tiny_tokenizer(text)["input_ids"]
    pieces = pieces_of(tiny_tokenizer, token_ids)
    assert "".join(pieces) == decode_response(tiny_tokenizer, token_ids) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1, "nothing was streamed before the end"


def test_special_tokens_are_not_written(tiny_tokenizer):
    token_ids = [*tiny_tokenizer("blue")["input_ids"], tiny_tokenizer.eos_token_id]
    assert "".join(pieces_of(tiny_tokenizer, token_ids)) == "blue"


def test_an_incomplete_character_comes_at_the_end_as_decoding_gives_it(tiny_tokenizer):
    token_ids = tiny_tokenizer("sky 🙂")["input_ids"][:-1]
    pieces = pieces_of(tiny_tokenizer, token_ids)
    assert "".join(pieces) == decode_response(tiny_tokenizer, token_ids)
    assert "\ufffd" in pieces[-1] and not any("\ufffd" in piece for piece in pieces[:-1])


def test_words_whose_space_depends_on_what_stands_before():
    """A decoder that drops the space of a text's first word, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁the", "▁sky", "▁is", "blue"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="blue"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    pieces = pieces_of(tokenizer, [0, 1, 2, 3, 1])
    assert "".join(pieces) == decode_response(tokenizer, [0, 1, 2, 3, 1]) == "the sky isblue sky"
