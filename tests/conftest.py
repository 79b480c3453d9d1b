"""Tiny models and tokenizers built in code (no network), and the folder of real data sets where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several threads on tiny matrices are slower, more so under xdist
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Shapes in signatures are checked where the mathematics is. An int counts as a float, as for the type checker.
_shape_checker = ModuleType("prefmix_shape_checker")
_shape_checker.__dict__["check"] = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[_shape_checker.__name__] = _shape_checker
install_import_hook(["prefmix.mixture", "prefmix.kernels"], f"{_shape_checker.__name__}.check")

# A loaded machine must not fail a test, and a failure must come back.
settings.register_profile("prefmix", deadline=None, derandomize=True)
settings.load_profile("prefmix")

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY_TEXT = [
    "What color is the sky? The sky is blue. The sky is green.",
    "Write a review of the film. I loved the film, it was great. I hated the film, it was bad.",
    "Where is the sun? In the sky. In the sea. Yes, it is. No, it is not.",
    "Once upon a time there was a little girl who lived in a small house near the forest.",
]

CHAT_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
    "{%- endif %}"
)


def _byte_level_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(VOCABULARY_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>" if chat_template else "<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over 320 tokens, no chat template: every text can be encoded and decoded."""
    return _byte_level_tokenizer(None)


@pytest.fixture(scope="session")
def tiny_chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary with a ChatML template that knows `tools` and `enable_thinking`."""
    return _byte_level_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., LlamaForCausalLM]:
    """Builds a seeded random Llama: D=32, 2 layers, V=320, float32, eval mode; config fields may be overridden."""

    def build(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        fields: dict[str, object] = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**(fields | overrides)))
            # Llama's small initial weights give nearly uniform predictions, which hide mistakes.
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
        return model.float().eval()

    return build


@pytest.fixture
def tiny_model(make_tiny_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """A fresh `make_tiny_model()` for one test."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def prefmix_data() -> Path:
    """The folder of real data sets; the test is skipped where PREFMIX_DATA does not name one."""
    folder = os.environ.get("PREFMIX_DATA")
    if not folder:
        pytest.skip("PREFMIX_DATA is not set: this test reads real data sets that the package does not ship")
    if not Path(folder).is_dir():
        pytest.skip(f"PREFMIX_DATA={folder} is not a folder")
    return Path(folder)
