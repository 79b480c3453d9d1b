"""Comparisons over real, distinct texts of fixed lengths, and how many tokens a step reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.convarg import load_convarg
from prefmix.data.datasets import read_named_file
from prefmix.data.sampler import PromptGroupedSampler

# Tokens of a prompt and of each response.
MIXES = {"1:1": (92, 92), "4:1": (147, 37), "1:3": (46, 138)}
# The prompt against both responses together: 1:1 and 4:1 in that sense.
AGAINST_BOTH = {"1:1 against both": (122, 62), "4:1 against both": (164, 20)}


class Rows(NamedTuple):
    """Comparisons and where their texts come from."""

    rows: list[dict[str, Any]]
    source: str


class StepTokens(NamedTuple):
    """Tokens of one step, mean over steps.

    Attributes:
        texts: distinct texts.
        real: tokens without padding.
        padded: texts times the longest of the step.
        completion: completion tokens, whose log-probabilities are summed.
        pairs_of_positions: sum over texts of L (L + 1) / 2, what causal attention reads.
        once: real tokens when a prompt counts once for all its texts.
        once_pairs_of_positions: positions that attend when a prompt is read once.
    """

    texts: float
    real: float
    padded: float
    completion: float
    pairs_of_positions: float
    once: float
    once_pairs_of_positions: float


def distinct_rows(mix: str, count: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Rows:
    """`count` comparisons in which no text stands twice: consecutive cuts of movie reviews, or of ConvArg's arguments.

    Lengths are cut in tokens; decoding and reading again may move one by a token, and training adds an end token.
    """
    texts, source = _real_texts()
    order = np.random.default_rng(seed).permutation(len(texts))
    pieces = _Pieces(tokenizer, (texts[i] for i in order))
    prompt, response = (MIXES | AGAINST_BOTH)[mix]
    rows = [
        {"prompt": pieces.next(prompt), "chosen": pieces.next(response - 1), "rejected": pieces.next(response - 1)}
        for _ in range(count)
    ]
    return Rows(rows, source)


def in_training_order(rows: list[dict[str, Any]], batch_size: int, seed: int) -> list[dict[str, Any]]:
    """The rows in the order in which `MixtureTrainer` reads them where texts do not repeat."""
    return [rows[i] for i in PromptGroupedSampler(np.arange(len(rows)), block_size=batch_size, seed=seed)]


def step_tokens(table: ComparisonTable, batches: list[np.ndarray]) -> StepTokens:
    """Counts the tokens of the steps whose rows `batches` name."""
    texts = table.texts
    counts = []
    for rows in batches:
        ids = np.unique(np.concatenate([table.chosen[rows], table.rejected[rows]]))
        prompt = np.array([len(texts.prompt_ids[i]) for i in ids])
        completion = np.array([len(texts.completion_ids[i]) for i in ids])
        length = prompt + completion
        _, first = np.unique(texts.prompt_index[ids], return_index=True)
        own = completion * prompt + completion * (completion + 1) // 2
        shared = (prompt * (prompt + 1) // 2)[first].sum() + own.sum()
        counts.append(
            StepTokens(
                len(ids),
                length.sum(),
                len(ids) * length.max(),
                completion.sum(),
                (length * (length + 1) // 2).sum(),
                prompt[first].sum() + completion.sum(),
                shared,
            )  # fmt: skip
        )
    return StepTokens(*(float(np.mean(values)) for values in zip(*counts)))


def _real_texts() -> tuple[list[str], str]:
    try:
        return [row["text"] for row in read_named_file("reviews", "movies_train")], "movie reviews"
    except ValueError:  # they are not shipped
        arguments = sorted({row[side] for row in load_convarg() for side in ("chosen", "rejected")})
        return arguments, "arguments of ConvArg, which the package ships"


class _Pieces:
    """Cuts a stream of texts into pieces of given lengths that start with a space, as responses do."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Iterator[str]) -> None:
        self._tokenizer, self._texts, self._ids = tokenizer, texts, list[int]()

    def next(self, length: int) -> str:
        """The next piece of `length` tokens."""
        self._read(length + 20)
        for skip in range(20):
            piece = self._tokenizer.decode(self._ids[skip : skip + length])
            if piece[:1].isspace():
                break
        self._ids = self._ids[skip + length :]
        return piece

    def _read(self, length: int) -> None:
        while len(self._ids) < length:
            text = next(self._texts, None)
            if text is None:
                raise SystemExit("the texts are used up: ask for fewer repetitions")
            self._ids += self._tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"]
