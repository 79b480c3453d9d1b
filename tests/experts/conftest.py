"""A small table of texts and a base model for it, without files or network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedModel

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


# Other architectures of the same size.
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# Window of four tokens: shorter than the texts, so that a wrong mask shows.
_WINDOW = {"sliding_window": 4}
_FAMILIES: dict[str, dict[str, object]] = {
    "Llama": {},
    "Mistral": _WINDOW,
    "Qwen2": {**_WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "Qwen3": {},
    "Gemma2": {**_WINDOW, "final_logit_softcapping": None, "query_pre_attn_scalar": 8},
    "Gemma3": {**_WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "Phi": {},
    "Phi3": {},
    "Olmo2": {},
    "GPT2": {},
}


def _make_family_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A seeded random model, float32, with weights large enough that mistakes show."""
    if family == "GPT2":
        config = transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_positions=128)
        model_class = transformers.GPT2LMHeadModel
    else:
        config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
        config = getattr(transformers, config_name)(**(_SIZES | _FAMILIES[family]))
        model_class = getattr(transformers, f"{family}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.float().eval()


@pytest.fixture(scope="session")
def make_family_model() -> Callable[..., PreTrainedModel]:
    """Builds a tiny random model of an architecture, D=32, 3 layers, V=320."""
    return _make_family_model


@pytest.fixture
def assert_states_of_whole_texts() -> Callable[..., None]:
    """Cached states and means equal those of every text read alone, unpadded."""

    def check(base: Any, texts: Any, states: Any) -> None:
        for i, (prompt, completion) in enumerate(zip(texts.prompt_ids, texts.completion_ids)):
            with torch.no_grad():
                expected = base.model.model(torch.tensor([prompt + completion])).last_hidden_state[0]
            found = states.gather([i])
            torch.testing.assert_close(found["hidden"], expected[len(prompt) - 1 : -1], rtol=1e-5, atol=1e-5)
            assert found["targets"].tolist() == completion
            torch.testing.assert_close(states.completion_mean[i], expected[len(prompt) :].mean(0), rtol=1e-5, atol=1e-5)
            prompt_mean = states.prompt_mean[texts.prompt_index[i]]
            torch.testing.assert_close(prompt_mean, expected[: len(prompt)].mean(0), rtol=1e-5, atol=1e-5)

    return check
