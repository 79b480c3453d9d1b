"""Arguments that people found more convincing than another of the same debate and side: whole debates are dealt, so
held-out pairs are over arguments, and subjects, that nobody trained on.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from pairs import Sizes, Splits, deal, deal_rows

from prefmix.data.convarg import load_convarg

MAX_WORDS = 60


def load_arguments(tokenizer: Any, sizes: Sizes, seed: int) -> Splits:
    """One judgement a row, ties left out; `seed` is of the split and the order of rows."""
    rng = np.random.default_rng(seed)
    found = [row for row in load_convarg(max_words=MAX_WORDS) if not row["tie"]]
    # Both sides of a debate go together: their arguments speak of the same things.
    debate_of: dict[str, set[str]] = defaultdict(set)
    for row in found:
        for name in ("chosen", "rejected"):
            debate_of[row[name]].add(row["prompt"].splitlines()[0])
    once = [row for row in found if len(debate_of[row["chosen"]]) == len(debate_of[row["rejected"]]) == 1]
    parts = deal(sorted({debate for debates in debate_of.values() for debate in debates}), rng)
    part_of = {text: parts[min(debates)] for text, debates in debate_of.items()}
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in once]
    return deal_rows(rows, part_of, tokenizer, sizes, rng)
