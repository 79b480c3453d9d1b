"""Text from tokens as they come: pieces that joined equal the decoded response, never half a character.

A response that goes on a text is decoded as what follows that text, so that prompt + response reads rightly: decoders
of SentencePiece tokenizers (Llama's, Gemma's) drop a space before the first word of whatever they decode.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class TextStream:
    """Decodes one token after another.

    Only the last few tokens are decoded again at each step: those since the last piece, preceded by the piece's own
    tokens, because a tokenizer may write a token differently at the start of a text. A piece waits while its last
    character is incomplete (U+FFFD: bytes of one character may be spread over several tokens).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_before: Sequence[int] = ()) -> None:
        """Starts after the tokens `text_before`, which are context and not written."""
        self._tokenizer = tokenizer
        self._token_ids = list(text_before)
        self._context_start = 0
        self._written = len(self._token_ids)

    def push(self, token_id: int) -> str:
        """Reads a token and returns the text that has become certain, often empty."""
        self._token_ids.append(token_id)
        piece = self._pending()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._context_start, self._written = self._written, len(self._token_ids)
        return piece

    def flush(self) -> str:
        """What still waits at the end, incomplete characters included."""
        piece = self._pending()
        self._context_start = self._written = len(self._token_ids)
        return piece

    def _pending(self) -> str:
        context = _decode(self._tokenizer, self._token_ids[self._context_start : self._written])
        return _decode(self._tokenizer, self._token_ids[self._context_start :])[len(context) :]


def decode_response(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], text_before: Sequence[int] = ()
) -> str:
    """The text of response tokens, special tokens left out and spaces as they were written.

        text(before + response) without its first len(text(before)) characters

    Args:
        tokenizer: of both.
        token_ids: the response.
        text_before: tokens of the text that the response goes on, spaces at the boundary included; none where it stands
            alone, as the content of a message does.
    """
    before, whole = _decode(tokenizer, text_before), _decode(tokenizer, [*text_before, *token_ids])
    text = whole[len(before) :]
    if "\ufffd" not in text:
        return text
    # Bytes that are no character make some decoders lose the valid bytes beside them, which a stream has written.
    stream = TextStream(tokenizer, text_before)
    return "".join([*(stream.push(token) for token in token_ids), stream.flush()])


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
