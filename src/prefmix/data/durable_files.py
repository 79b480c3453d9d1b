"""Is it on the disk, and is it what was written? For everything that is written aside and renamed into place."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk: a rename is durable when the folder is synced after it."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # Windows cannot open a folder for syncing, nor sync a file that is only read
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
