"""Tokens that padded batches hold beyond those of their texts: random order against batches of like length.

    python benchmarks/padding.py --tokenizer FOLDER

The shipped arguments (few texts that many people judge, with and without blocks of one prompt), and, where
PREFMIX_DATA names the folder of data sets, pairs of whole movie reviews. A batch reads each of its texts once, as
training does. Experts that read what texts share once (`prefix_sharing`) put texts end to end where the architecture
allows it, and pad nothing in either order.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.convarg import load_convarg
from prefmix.data.sampler import PromptGroupedSampler
from prefmix.data.tokenization import tokenize_rows
from prefmix.experts.smollm2 import find_smollm2
from prefmix.training.order import longer_text


class Tokens(NamedTuple):
    """Of the batches of two epochs.

    Attributes:
        real: tokens of texts.
        padded: with what fills rows up to the longest.
    """

    real: int
    padded: int

    @property
    def share(self) -> float:
        """Share of padding."""
        return 1 - self.real / self.padded


def count_tokens(table: ComparisonTable, batch_size: int, together: bool, by_length: bool) -> Tokens:
    """What batches of one process hold."""
    texts = zip(table.texts.prompt_ids, table.texts.completion_ids, strict=True)
    lengths = np.array([len(prompt) + len(completion) for prompt, completion in texts])
    order = PromptGroupedSampler(
        table.prompt if together else np.arange(len(table)),
        block_size=batch_size,
        lengths=longer_text(table) if by_length else None,
    )
    real = padded = 0
    for epoch in range(2):
        order.set_epoch(epoch)
        rows = np.array(list(order))
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            found = lengths[np.union1d(table.chosen[batch], table.rejected[batch])]
            real, padded = real + int(found.sum()), padded + len(found) * int(found.max())
    return Tokens(real, padded)


def review_pairs(folder: Path, count: int = 1500) -> list[dict[str, Any]]:
    """Whole reviews in pairs drawn at random."""
    with gzip.open(folder / "reviews" / "movies_train.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [" " + json.loads(line)["text"] for line in lines]
    random.Random(0).shuffle(texts)
    return [
        {"prompt": "Write a review of a film.", "chosen": texts[2 * i], "rejected": texts[2 * i + 1]}
        for i in range(count)
    ]


def report(name: str, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
    """Prints one line for each way to group."""
    table = tokenize_rows(rows, tokenizer, max_length=1024, progress=False)
    for together in (False, True) if len(table) > 2 * len(table.texts) else (False,):
        random_order, like = (count_tokens(table, batch_size, together, by_length) for by_length in (False, True))
        print(
            f"| {name}{', blocks of a prompt' if together else ''} | {100 * random_order.share:.1f}% | "
            f"{100 * like.share:.1f}% | {like.padded / random_order.padded:.3f} |"
        )


def main() -> None:
    """Parses, counts, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokenizer", help="folder or hub name; default: SmolLM2's")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or str(find_smollm2("smollm2").folder))
    print(f"batches of {args.batch_size} comparisons\n")
    print(
        "| rows | padding, random | padding, like lengths | padded tokens, like / random |\n| --- | --- | --- | --- |"
    )
    report("arguments", load_convarg(), tokenizer, args.batch_size)
    if os.environ.get("PREFMIX_DATA"):
        report("reviews", review_pairs(Path(os.environ["PREFMIX_DATA"])), tokenizer, args.batch_size)


if __name__ == "__main__":
    main()
