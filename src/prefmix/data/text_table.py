"""Truncation and the table of distinct texts. Only lists of token ids here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from prefmix.data.comparisons import TextTable

TruncationMode = Literal["keep_start", "keep_end"]


class SplitText(NamedTuple):
    """One text: context, and the tokens that are scored.

    Attributes:
        prompt: token ids that are only read.
        completion: token ids whose log-probabilities are summed.
    """

    prompt: list[int]
    completion: list[int]


def truncate(text: SplitText, max_length: int | None, mode: TruncationMode) -> SplitText:
    """At most `max_length` tokens of prompt + completion, from the start or the end.

    Nothing predicts the first token of a sequence, so a text that is left without a prompt gives its first token up as
    context: the log-probability is that of TRL, whose shifted mask leaves that token out too.
    """
    prompt, completion = text
    excess = 0 if max_length is None else max(0, len(prompt) + len(completion) - max_length)
    if excess and mode == "keep_start":
        assert max_length is not None
        prompt, completion = prompt[:max_length], completion[: max(0, max_length - len(prompt))]
    elif excess:
        prompt, completion = prompt[excess:], completion[max(0, excess - len(prompt)) :]
    return SplitText(prompt, completion) if prompt else SplitText(completion[:1], completion[1:])


def common_prefix_length(ids: Sequence[int], other: Sequence[int]) -> int:
    """Number of leading tokens that both sequences have in common."""
    if other[: len(ids)] == ids:  # nearly always: the prompt is a prefix of prompt + completion
        return len(ids)
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))


class TextTableBuilder:
    """Collects texts, each distinct one once.

    Two texts are the same when their truncated token ids and the start of their completions are. Prompts are
    distinguished before `keep_end` cuts them, so both responses of a pair belong to one prompt.
    """

    def __init__(self, max_length: int | None, mode: TruncationMode, empty_prompt_id: int = 0) -> None:
        self._max_length, self._mode = max_length, mode
        # Stands for a prompt without tokens where its states are pooled.
        self._empty_prompt = (empty_prompt_id,)
        self._texts: dict[tuple[tuple[int, ...], int], int] = {}
        self._prompts: dict[tuple[int, ...], int] = {}
        self._split: list[SplitText] = []
        self._prompt_index: list[int] = []

    def add(self, text: SplitText, *, reuse: bool = True) -> int | None:
        """The index of the text; None where truncation leaves nothing to score. `reuse=False` never shares an entry."""
        cut = truncate(text, self._max_length, self._mode)
        if not cut.completion:
            return None
        key = (tuple(cut.prompt + cut.completion), len(cut.prompt))
        if reuse and key in self._texts:
            return self._texts[key]
        self._texts[key] = len(self._split)
        self._split.append(cut)
        kept = text.prompt if self._max_length is None else text.prompt[-self._max_length :]
        prompt = tuple(kept) or self._empty_prompt
        self._prompt_index.append(self._prompts.setdefault(prompt, len(self._prompts)))
        return len(self._split) - 1

    def build(self) -> TextTable:
        """The table of everything added."""
        return TextTable(
            prompt_ids=[text.prompt for text in self._split],
            completion_ids=[text.completion for text in self._split],
            prompt_index=np.array(self._prompt_index, dtype=np.int64),
            prompts=[list(prompt) for prompt in self._prompts],
        )
