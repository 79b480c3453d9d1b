"""Where prefmix keeps what it can make again: downloads, converted models and trunk states."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$PREFMIX_CACHE`, else `prefmix` in `$XDG_CACHE_HOME` or `~/.cache`; created where it is absent."""
    chosen = os.environ.get("PREFMIX_CACHE")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen).expanduser() if chosen else user_cache / "prefmix"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
