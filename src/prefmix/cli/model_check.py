"""Is there a usable base model under this name? Looks at files and headers; torch and transformers stay unloaded."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from prefmix.experts.smollm2 import HUB_NAME, SMOLLM2_NAMES, WHEEL

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "spiece.model")


def check_model(source: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """One line about the base model.

    Args:
        source: a folder, a hub name, or `smollm2`.
        revision: revision on the hub.
        trust_remote_code: whether code of the model may run.

    Raises:
        ValueError: no such model, or a folder without config, weights or tokenizer, or with truncated weights.
    """
    if source in SMOLLM2_NAMES:
        return f"{source} (SmolLM2-135M-Instruct from a cache on this machine, else the hub, else PyPI's {WHEEL})"
    if Path(source).is_dir():
        return _check_folder(Path(source), trust_remote_code)
    if Path(source).is_file() and source.endswith(".gguf"):
        return f"{source} (GGUF, {_size([Path(source)])})"
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).is_file():
        raise ValueError(f"model={source!r}: no such folder; give a model folder, a hub name, or smollm2")
    return _check_hub(source, revision)


def _check_folder(folder: Path, trust_remote_code: bool) -> str:
    weights = [file for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
    if not weights:
        raise ValueError(f"model={str(folder)!r}: no weights there (*.safetensors, *.bin or *.gguf)")
    if all(file.suffix == ".gguf" for file in weights):
        return f"{folder} ({weights[0].name}, GGUF, {_size(weights)})"
    config = _read_config(folder / "config.json")
    if config.get("auto_map") and not trust_remote_code:
        raise ValueError(
            f"model={str(folder)!r} brings its own code; read it, then allow it with --trust_remote_code true"
        )
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ValueError(f"model={str(folder)!r}: no tokenizer there ({', '.join(_TOKENIZERS[:3])})")
    for file in weights:
        if file.suffix == ".safetensors":
            _check_safetensors(file)
    return f"{folder} ({config.get('model_type', 'unknown type')}, {_size(weights)})"


def _read_config(file: Path) -> dict[str, object]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model: {file} is missing; save the model with save_pretrained") from None
    except ValueError as error:
        raise ValueError(f"model: {file} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"model: {file} does not hold a JSON object")
    return config


def _check_safetensors(file: Path) -> None:
    """A safetensors file says in its header how long it is; a download that broke off is shorter."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < size else {}
    except (struct.error, ValueError):
        header = {}
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if not ends or 8 + length + max(ends) != size:
        raise ValueError(f"model: {file} is damaged or cut off ({size} bytes); download or save it again")


def _check_hub(name: str, revision: str | None) -> str:
    from huggingface_hub import constants, model_info, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return f"{name} (in the local hub cache)"
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        raise ValueError(
            f"model={name!r}: no such folder, and not in the local hub cache while HF_HUB_OFFLINE is set{_hint(name)}"
        )
    try:
        model_info(name, revision=revision, timeout=10)
    except GatedRepoError:
        raise ValueError(f"model={name!r} is gated; accept its terms on the hub, then: hf auth login") from None
    except RevisionNotFoundError:
        raise ValueError(f"model={name!r}: no revision {revision!r} on the hub") from None
    except Exception:  # the hub's client raises many kinds; all of them mean that there is no such model for us
        raise ValueError(
            f"model={name!r}: no such folder, not in the local hub cache, and the hub does not give it; check the "
            f"spelling and the network{_hint(name)}"
        ) from None
    return f"{name} (on the hub)"


def _hint(name: str) -> str:
    return "; `smollm2` gets the same model from PyPI where there is no hub" if name == HUB_NAME else ""


def _size(files: list[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
