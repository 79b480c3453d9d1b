"""Folders that trainers ask for and that nobody reads afterwards."""

from __future__ import annotations

import tempfile

_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def scratch_folder() -> str:
    """A new folder that goes when the process ends."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="prefmix-bench-"))
    return _FOLDERS[-1].name
