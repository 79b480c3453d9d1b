"""Where a benchmark ran, and the speed limit there."""

from __future__ import annotations

import datetime
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "prefmix")


def matrix_product_peak(dtype: torch.dtype, repeats: int = 4) -> float:
    """Best of a few single-thread matrix products, in GFLOP per CPU second."""
    best = 0.0
    for size in (1024, 2048):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        for _ in range(repeats):
            start = time.process_time()
            torch.mm(a, b)
            best = max(best, 2e-9 * size**3 / (time.process_time() - start))
    return best


def describe_machine() -> dict[str, Any]:
    """Date, commit, processor and versions; no path of this machine."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "--", ":/src"], capture_output=True, text=True, check=False
    ).stdout
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "source_modified": bool(dirty.strip()),
        "cpu": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in reversed(lines) if ":" in line}
    if not fields.get("model name"):
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
