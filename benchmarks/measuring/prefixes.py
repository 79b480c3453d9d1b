"""Forward and backward of a trunk with LoRA, prompts read once against twice, nothing else in the step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from measuring.contenders import ALPHA, RANK
from measuring.intervals import Interval, ratio_interval
from measuring.texts import StepTokens, distinct_rows, step_tokens
from prefmix.data.tokenization import tokenize_rows
from prefmix.experts.base_model import BaseModel
from prefmix.experts.branches import BranchedExperts
from prefmix.experts.reading import Reading, padded_reading, run_reading
from prefmix.experts.text_pass import pad_texts
from prefmix.experts.text_reader import TextReader


class PrefixSharing(NamedTuple):
    """What reading prompts once gains.

    Attributes:
        twice: CPU seconds of each round, rows of their own.
        once: CPU seconds of each round, prompts shared.
        ratio: twice over once.
        limit: tokens of the one over tokens of the other.
        error: largest difference of completion states, relative to their norm.
    """

    twice: list[float]
    once: list[float]
    ratio: Interval
    limit: float
    error: float


def measure_prefix_sharing(
    base: BaseModel, mix: str, pairs: int, repetitions: int, note: Callable[[str], None]
) -> PrefixSharing:
    """Both layouts take turns over the same comparisons; the first round warms up.

    Raises:
        SystemExit: the states differ by more than 1e-4.
    """
    assert base.tokenizer is not None
    table = tokenize_rows(distinct_rows(mix, pairs, base.tokenizer).rows, base.tokenizer, progress=False)
    texts = pad_texts(table.texts, np.arange(len(table.texts)))
    experts = BranchedExperts(base.model, 1, -1, rank=RANK, lora_alpha=ALPHA)
    readings = {"twice": padded_reading(texts), "once": TextReader(base.model).read(texts)}
    with torch.no_grad():
        twice, once = (run_reading(base.model, reading).hidden for reading in readings.values())
    error = float((once - twice).norm(dim=-1).max() / twice.norm(dim=-1).max())
    if not error <= 1e-4:
        raise SystemExit(f"correctness gate: prompts read once change states by {error:.1e}; nothing is timed")
    seconds: dict[str, list[float]] = {"twice": [], "once": []}
    for turn in range(repetitions + 1):
        for name, reading in readings.items():
            cpu = _forward_and_backward(experts, reading)
            if turn:
                seconds[name].append(cpu)
    tokens: StepTokens = step_tokens(table, [np.arange(len(table))])
    ratio = ratio_interval(seconds["twice"], seconds["once"])
    note(f"{mix}: prompts once, trunk alone: {ratio}")
    return PrefixSharing(seconds["twice"], seconds["once"], ratio, tokens.real / tokens.once, error)


def _forward_and_backward(experts: BranchedExperts, reading: Reading) -> float:
    assert experts.branches is not None
    experts.zero_grad(set_to_none=True)
    start = time.process_time()
    (matrices,) = experts.branches.unbind()
    with experts.branches.applied(matrices):
        hidden = run_reading(experts.base_model, reading).hidden
    hidden.sum().backward()
    return time.process_time() - start
