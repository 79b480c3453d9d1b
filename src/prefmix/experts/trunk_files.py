"""Trunk states on disk: one flat file of states, one safetensors file of tables, and a manifest that checks both.

A folder is written under a temporary name and renamed when every byte is on disk; what is found damaged is built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefmix.data.durable_files import sync

FORMAT_VERSION = 2
_MANIFEST, _TABLES, _HIDDEN = "manifest.json", "tables.safetensors", "hidden.bin"
# 65,536 blocks of 4 kB: a file below 256 MB is checked whole, a larger one evenly in under a second.
_BLOCK, _MOST_BLOCKS = 4096, 65_536


class DamagedCache(Exception):
    """A cache folder cannot be used; says why."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` when the body ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:16]}-", dir=target.parent))
    try:
        yield folder
        for file in folder.iterdir():
            sync(file)
        if target.exists():
            shutil.rmtree(target)
        try:
            os.replace(folder, target)
        except OSError:
            if not target.exists():  # else another process wrote the same content in this moment
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def map_hidden(folder: Path, rows: int, columns: int, dtype: torch.dtype, *, create: bool = False) -> Tensor:
    """The states [rows, columns] as a memory map; `create` makes the file and lets writes reach it.

    Raises:
        ValueError: the disk is too full for a new file.
    """
    size = rows * columns * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if create and free < size:
        raise ValueError(
            f"cache_dir={folder.parent}: trunk states take {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "choose another cache_dir, a 16-bit type, or cache_states='off'"
        )
    flat = torch.from_file(str(folder / _HIDDEN), shared=create, size=rows * columns, dtype=dtype)
    return flat.view(rows, columns)


def write_tables(folder: Path, tables: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Writes the small tensors and the manifest; the states are there already."""
    save_file(tables, str(folder / _TABLES))
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "files": {name: _fingerprint(folder / name) for name in (_TABLES, _HIDDEN)},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_tables(folder: Path) -> dict[str, Tensor]:
    """The small tensors, after checking every file against the manifest.

    Raises:
        DamagedCache: a file is missing, shorter, longer or changed.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            if _fingerprint(folder / name) != expected:
                raise DamagedCache(f"{folder / name} is not what was written")
        return load_file(str(folder / _TABLES))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedCache(f"{folder}: {error}") from error


def _fingerprint(file: Path) -> dict[str, int | str]:
    """Size and SHA-256 of evenly spaced blocks (of all bytes in a file below 256 MB)."""
    size, digest = file.stat().st_size, hashlib.sha256()
    blocks = -(-size // _BLOCK)
    with file.open("rb") as stream:
        if blocks <= _MOST_BLOCKS:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        else:
            for i in range(_MOST_BLOCKS):
                stream.seek((blocks - 1) * i // (_MOST_BLOCKS - 1) * _BLOCK)
                digest.update(stream.read(_BLOCK))
    return {"bytes": size, "sha256": digest.hexdigest()}
