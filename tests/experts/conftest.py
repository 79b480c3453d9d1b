"""A small table of texts and a base model for it, without files or network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from prefmix.data.comparisons import TextTable
from prefmix.experts.base_model import BaseModel, content_sha256

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15]]
COMPLETIONS = [[20], [21, 22, 23, 24, 25, 26], [30, 31], [32, 33, 34, 35], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
PROMPT_INDEX = [0, 0, 1, 2, 2]


def _make_texts(change: dict[int, list[int]] | None = None) -> TextTable:
    completions = [(change or {}).get(i, ids) for i, ids in enumerate(COMPLETIONS)]
    return TextTable([PROMPTS[p] for p in PROMPT_INDEX], completions, np.array(PROMPT_INDEX), PROMPTS)


@pytest.fixture
def make_texts() -> Callable[..., TextTable]:
    """Builds five texts of three prompts; `change` replaces completions by index."""
    return _make_texts


@pytest.fixture
def base(tiny_model: LlamaForCausalLM) -> BaseModel:
    """The tiny model as `load_base` would give it."""
    return BaseModel(tiny_model, None, "<tiny>", content_sha256(tiny_model))
