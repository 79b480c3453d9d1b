"""Text from tokens as they come: pieces that joined equal the decoded response, never half a character."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class TextStream:
    """Decodes one token after another.

    Only the last few tokens are decoded again at each step: those since the last piece, preceded by the piece's own
    tokens, because a tokenizer may write a token differently at the start of a text. A piece waits while its last
    character is incomplete (U+FFFD: bytes of one character may be spread over several tokens).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._context_start = 0
        self._written = 0

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
        context = self._decode(self._token_ids[self._context_start : self._written])
        return self._decode(self._token_ids[self._context_start :])[len(context) :]

    def _decode(self, token_ids: list[int]) -> str:
        return decode_response(self._tokenizer, token_ids)


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of response tokens, special tokens left out and spaces as they were written."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
