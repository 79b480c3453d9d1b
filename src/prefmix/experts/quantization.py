"""Bases whose linear layers hold 8- or 4-bit weights (bitsandbytes); the output head stays whole: experts read it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

QUANTIZATIONS = ("8bit", "4bit")


def quantization_options(folder: str, quantization: str | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`; none for no quantization, or for weights that are stored quantised.

    4 bits are NF4 (the type that QLoRA found best for normally distributed weights), without double quantization.

    Args:
        folder: a folder or hub name.
        quantization: "8bit", "4bit" or None.
        dtype: type of products with 4-bit weights; by default bfloat16 on a GPU, else float32.

    Raises:
        ValueError: another name, bitsandbytes is missing, or the weights come from a GGUF file.
    """
    if quantization is None:
        return {}
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization={quantization!r}: choose one of {', '.join(QUANTIZATIONS)}")
    option = f"load_in_{quantization}"
    if folder.endswith(".gguf"):
        raise ValueError(f"{option}=true with {folder}: a GGUF file is read into whole weights; give the safetensors")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{option}=true: bitsandbytes is not installed; run `pip install 'prefmix[quantized]'`")
    if PretrainedConfig.get_config_dict(folder)[0].get("quantization_config"):
        return {}
    # It says at every product that activations become float16 before they become int8.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    compute = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    fields = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute} if quantization == "4bit" else {}
    return {"quantization_config": BitsAndBytesConfig(**{option: True}, **fields)}


def quantization_of(model: PreTrainedModel) -> str | None:
    """The bits in which bitsandbytes holds the model's linear layers ("8bit", "4bit"), else None."""
    config = getattr(model.config, "quantization_config", None)
    fields = {} if config is None else config if isinstance(config, dict) else config.to_dict()
    found = [name for name in QUANTIZATIONS if fields.get(f"load_in_{name}")]
    return found[0] if found else None


def keep_arithmetic(model: PreTrainedModel) -> PreTrainedModel:
    """Keeps 4-bit layers to one arithmetic on a CPU, in place.

    In evaluation mode and without gradient, bitsandbytes packs the weights of a CPU with bfloat16 instructions anew,
    rounds their scales, and multiplies in bfloat16 from then on: reference and experts would differ from the start.
    """
    if quantization_of(model) == "4bit":
        import bitsandbytes

        for layer in model.modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                layer.support_avx512bf16_for_cpu = False
    return model


def quantized_sha256(model: PreTrainedModel, config: dict[str, Any], source: str) -> str:
    """SHA-256 of a quantised model by what it was made of: config, settings, and the tensors of its checkpoint.

    Packed weights themselves may differ from device to device and between releases of bitsandbytes, and a policy must
    find its base on another machine. The settings count, so states of a quantised trunk are never taken for others.

    Args:
        model: a quantised model.
        config: what its configuration means.
        source: folder or hub name of its safetensors files; without any, packed weights and scales count.
    """
    settings = model.config.quantization_config
    fields = settings if isinstance(settings, dict) else settings.to_dict()
    digest = hashlib.sha256(json.dumps([config, fields, str(model.dtype)], sort_keys=True, default=str).encode())
    files = _checkpoint_files(source)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                _add(digest, name, tensors.get_tensor(name))
    if not files:
        for name, tensor in sorted(model.state_dict().items()):
            _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    digest.update(flat)


def _checkpoint_files(source: str) -> list[Path]:
    folder = Path(source)
    if not source:
        return []
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns="*.safetensors", local_files_only=True))
        except (OSError, ValueError):
            return []
    return sorted(folder.glob("*.safetensors"))
