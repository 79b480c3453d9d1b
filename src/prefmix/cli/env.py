"""`prefmix env`: what a bug report needs."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefmix import __version__
from prefmix.cli.output import add_format, print_json, print_pairs

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "tokenizers", "numpy", "trl")
_VARIABLES = (
    "PREFMIX_DATA",
    "PREFMIX_CACHE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PREFMIX_KERNEL",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Prints versions, devices and the variables that change behaviour."""
    facts = environment()
    if args.format == "json":
        print_json(facts)
    else:
        print_pairs(facts)


def environment() -> dict[str, Any]:
    """Versions, devices, bfloat16 support, threads and memory."""
    facts: dict[str, Any] = {
        "prefmix": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu cores": os.cpu_count(),
    }
    facts |= {name: _version(name) for name in _PACKAGES}
    facts |= _devices()
    facts["profiles for accelerate"] = str(Path(__file__).parents[1] / "training" / "profiles")
    facts |= {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"devices": f"torch cannot be imported: {error}"}
    cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else []
    return {
        "devices": names or ["mps" if torch.backends.mps.is_available() else "cpu"],
        "bfloat16": torch.cuda.is_bf16_supported() if cuda else "in software" if not _cpu_bf16() else "yes",
        "torch threads": torch.get_num_threads(),
        "low-rank heads": _heads(torch.device("cuda" if cuda else "cpu")),
    }


def _heads(device: Any) -> str:
    """Which implementation "auto" takes; asking compiles the C code where that was not done yet."""
    import torch

    from prefmix.kernels.implementations import automatic
    from prefmix.kernels.low_rank_compiled import why_not
    from prefmix.kernels.low_rank_problem import Demand

    try:
        name = automatic(Demand(device, torch.float32, torch.float32, rank=16))
    except ValueError as error:
        return str(error)
    reason = why_not() if name == "chunked" and device.type == "cpu" else None
    return name if reason is None else f"{name} ({reason})"


def _cpu_bf16() -> bool:
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
