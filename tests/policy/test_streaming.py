"""Pieces joined are the decoded text, and no piece ends within a character."""

from __future__ import annotations

import copy

import pytest

from prefmix.policy.streaming import TextStream, decode_response

TEXTS = ["The sky is blue.", "naïve café", "日本語 and 🙂🙃", "  two  spaces\n\nand lines ", "👩‍👩‍👧 family"]


def pieces_of(tokenizer, token_ids, text_before=()):
    stream = TextStream(tokenizer, text_before)
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
    assert "".join(pieces) == decode_response(tiny_tokenizer, token_ids) == tiny_tokenizer.decode(token_ids)
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


@pytest.fixture(scope="module")
def llama_tokenizer():
    """Llama's pipeline over 320 tokens: a space before every text, bytes for what is unknown, one space stripped."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "▁the", "▁sky", "▁is", "▁blue", "is", "blue", "."]
    words += [f"▁word{i}" for i in range(320 - 3 - 256 - len(words))]
    scores = [*(("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)), *((word, -1.0) for word in words)]
    scores += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces, one_space = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), one_space])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )


@pytest.mark.parametrize("prompt", ["the sky", "the sky ", "blue.\n", "日本"])
@pytest.mark.parametrize(
    ("tokens", "response"),
    [
        (["▁is", "▁blue", "</s>"], " is blue"),
        (["is", "▁blue"], "is blue"),
        (["▁", "▁blue"], "  blue"),
        (["<0x0A>", "▁is"], "\n is"),
        (["▁", *(f"<0x{byte:02X}>" for byte in "🙂".encode()), "▁is"], " 🙂 is"),
        (["</s>"], ""),
    ],
)
def test_a_response_after_a_text_keeps_its_first_space(llama_tokenizer, prompt, tokens, response):
    before = llama_tokenizer(prompt)["input_ids"]
    assert decode_response(llama_tokenizer, before) == prompt
    token_ids = llama_tokenizer.convert_tokens_to_ids(tokens)
    assert decode_response(llama_tokenizer, token_ids, before) == response
    assert "".join(pieces_of(llama_tokenizer, token_ids, before)) == response


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokenizers_decode_alike_after_any_text(tiny_tokenizer, text):
    before, token_ids = tiny_tokenizer("The film.")["input_ids"], tiny_tokenizer(text)["input_ids"]
    assert decode_response(tiny_tokenizer, token_ids, before) == decode_response(tiny_tokenizer, token_ids) == text
    assert pieces_of(tiny_tokenizer, token_ids, before) == pieces_of(tiny_tokenizer, token_ids)


def test_generate_reads_on_from_the_prompt_streamed_or_whole(make_policy, llama_tokenizer):
    policy = make_policy(tokenizer=llama_tokenizer)
    prompt = "the sky"
    ids = llama_tokenizer(prompt)["input_ids"]
    first_spaces = 0
    for seed in range(12):
        options = {"max_new_tokens": 6, "seed": seed}
        response = policy.generate(prompt, return_details=True, **options)
        assert "".join(policy.generate(prompt, stream=True, **options)) == response.text
        if "\ufffd" not in response.text:  # random models write bytes that are no character
            assert prompt + response.text == llama_tokenizer.decode(ids + response.token_ids, skip_special_tokens=True)
        first_spaces += response.text.startswith(" ")
    assert first_spaces > 1, "no response began with a space"


def test_an_answer_to_messages_is_the_content_of_a_message(make_policy, llama_tokenizer):
    """The template's space before an answer is not the answer's."""
    tokenizer = copy.deepcopy(llama_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '. ' }}{% endfor %}"
    policy = make_policy(tokenizer=tokenizer)
    for seed in range(6):
        options = {"max_new_tokens": 6, "seed": seed}
        response = policy.generate([{"role": "user", "content": "the sky"}], return_details=True, **options)
        assert response.text == decode_response(tokenizer, response.token_ids)
        streamed = policy.generate([{"role": "user", "content": "the sky"}], stream=True, **options)
        assert "".join(streamed) == response.text
