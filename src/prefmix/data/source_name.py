"""What rows in any form are called: the name that a model card gives its training data."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

# Where `datasets` keeps what it fetched: its cache has a folder owner___name for a set of the hub.
_HUB_FOLDER = re.compile(r"[/\\]([^/\\]+)___([^/\\]+)[/\\]")


def source_name(source: Any) -> str:
    """The name of rows that training is given, empty where they have none (rows and tables in memory).

    A path or a name is itself. A `datasets` object is called by the hub's name, or by its builder (`json`) and the
    fingerprint of its rows, with configuration and split: `owner/people (tastes), train`.
    """
    if isinstance(source, str | Path):
        return str(source)
    if "datasets" not in sys.modules:
        return ""
    import datasets

    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        source = source.get("train") if "train" in source else next(iter(source.values()), None)
    if not isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return ""
    info, config = source.info, str(source.info.config_name or "")
    name, split = _hub_name(source), "" if source.split is None else f", {source.split}"
    if name:
        return f"{name} ({config}){split}" if config and not config.startswith("default") else f"{name}{split}"
    name, fingerprint = info.dataset_name or info.builder_name, getattr(source, "_fingerprint", None)
    if not name:
        return ""
    return f"{name} (fingerprint {fingerprint}){split}" if fingerprint else f"{name}{split}"


def _hub_name(source: Any) -> str:
    files = getattr(source, "cache_files", ())
    found = next(filter(None, (_HUB_FOLDER.search(file["filename"]) for file in files)), None)
    return f"{found[1]}/{found[2]}" if found else ""
