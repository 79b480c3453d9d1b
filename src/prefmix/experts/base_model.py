"""Loading the base model, and the fingerprint that ties trained experts to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prefmix.experts.hub import hub_answers
from prefmix.experts.quantization import keep_arithmetic, quantization_of, quantization_options, quantized_sha256
from prefmix.experts.smollm2 import SMOLLM2_NAMES, find_smollm2

# Fields of a config that do not change what the model computes, or that depend on who loaded it.
_VOLATILE = {"architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config"}


class BaseModel(NamedTuple):
    """A causal language model to share.

    Attributes:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; None for a model object whose tokenizer cannot be found.
        source: a name or folder that `load_base` takes again; "<...>" for a model object without one.
        sha256: of weights and config by content, in the type they were loaded in.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    sha256: str


BaseSource = str | Path | PreTrainedModel | BaseModel


def load_base(
    source: BaseSource,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> BaseModel:
    """Loads a causal language model and its tokenizer.

    Args:
        source: a local folder, a `.gguf` file, a name on the hub (`HF_HUB_OFFLINE` is honoured), a model object, or
            "smollm2" (SmolLM2-135M-Instruct from wherever it can be had, see `smollm2.find_smollm2`). A `BaseModel` is
            given back as it is, in its own type.
        gguf_file: file in the folder or repository to read instead of safetensors.
        dtype: type of the weights; by default the checkpoint's own.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether code from the hub may run.
        quantization: "8bit" or "4bit": linear layers but the output head hold such weights (bitsandbytes).

    Raises:
        ValueError: `source` is something else, the folder is absent, the hub cannot be reached, there is no causal
            language model, or it cannot be quantised here.
    """
    if isinstance(source, BaseModel):
        return source
    given: Any = source
    if not isinstance(given, str | Path | PreTrainedModel):
        raise ValueError(
            f"base model of type {type(given).__name__}: give a folder, a name, a transformers model or a BaseModel"
        )
    if isinstance(source, PreTrainedModel):
        whole = quantization_of(source) is None  # packed weights have no other type
        model: PreTrainedModel = cast(Any, source).to(dtype) if whole and dtype is not None else source
        name = model.config.name_or_path or f"<{type(model).__name__} object>"
        return BaseModel(keep_arithmetic(model).eval(), _tokenizer_of(name), name, content_sha256(model))
    name, folder = _locate(str(source))
    if folder.endswith(".gguf"):
        folder, gguf_file = str(Path(folder).parent), Path(folder).name
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    options |= {"gguf_file": gguf_file} if gguf_file else {}
    options |= {} if Path(folder).exists() or hub_answers(folder) else {"local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        quantized = quantization_options(gguf_file or folder, quantization, dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **options, **quantized)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"base model {name}: {_reason(error)}") from error
    except RuntimeError as error:
        if quantization is None:
            raise
        raise ValueError(f"base model {name}: load_in_{quantization}=true does not work here: {error}") from error
    model = without_quantization_marks(model) if gguf_file else model
    return BaseModel(keep_arithmetic(model).eval(), tokenizer, name, content_sha256(model))


def content_sha256(model: PreTrainedModel) -> str:
    """SHA-256 over the config's meaning and every weight's name, type, shape and bytes; tied weights count once.

    A quantised model has that of `quantization.quantized_sha256`.
    """
    config = {
        key: value
        for key, value in model.config.to_diff_dict().items()
        if not key.startswith("_") and key not in _VOLATILE
    }
    if quantization_of(model) is not None:
        return quantized_sha256(model, config, model.config.name_or_path or "")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in _weights(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(flat)
    return digest.hexdigest()


def without_quantization_marks(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of the GGUF file they came from.

    transformers refuses to save a model that was read from GGUF, though its weights are ordinary tensors by then.
    """
    config = model.config.__class__.from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        clean = type(model)(config)
    # Buffers that are computed, not stored (rotary frequencies), are taken over as they are.
    computed = dict(model.named_buffers())
    clean.load_state_dict(model.state_dict(), assign=True)
    for name, _ in list(clean.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(clean.get_submodule(owner), leaf, computed[name])
    clean.tie_weights()
    if model.generation_config is not None:
        clean.generation_config = model.generation_config
    return clean.eval()


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    stored = model.state_dict(keep_vars=True).keys()
    yield from sorted(model.named_parameters())
    yield from sorted((name, tensor) for name, tensor in model.named_buffers() if name in stored)


def _locate(source: str) -> tuple[str, str]:
    """The name to remember and the folder or hub name to load."""
    if source in SMOLLM2_NAMES:
        found = find_smollm2(source)
        return found.name, str(found.folder)
    path = Path(source).expanduser()
    if path.exists():
        return source, str(path)
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ValueError(f"base model {source}: no such file or folder; give a folder, a hub name or smollm2")
    return source, source


def _tokenizer_of(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model object's weights, if it is on this machine: a search must not reach for the hub."""
    if name.startswith("<"):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return None


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, ImportError):
        return f"{first}; install what is missing (reading GGUF needs `pip install gguf`)"
    return f"{first} (give a folder or a hub name of a causal language model; offline, one that is in the hub's cache)"
