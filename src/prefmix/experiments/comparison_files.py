"""What a comparison leaves behind: results.json (without single predictions), table.md and comparison.svg."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from prefmix import __version__
from prefmix.evaluation.report import finite
from prefmix.experiments.compare_settings import CompareSettings
from prefmix.experiments.comparison_table import comparison_lines, legend, picture, table_markdown, table_text
from prefmix.training.record import machine


def write_comparison(settings: CompareSettings, cells: Sequence[Mapping[str, Any]], title: str) -> str:
    """Writes everything into `output_dir` and returns the table as text.

    Args:
        settings: of the comparison.
        cells: all that are done.
        title: of table and picture.
    """
    folder, lines = Path(settings.output_dir), comparison_lines(cells)
    words = legend(lines, cells)
    results = {
        "settings": _portable(settings),
        "provenance": provenance(),
        "arms": [line.to_dict() for line in lines],
        "cells": [{name: value for name, value in cell.items() if name not in _PREDICTIONS} for cell in cells],
    }
    (folder / "results.json").write_text(json.dumps(finite(results), indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(f"{title}\n\n{table_markdown(lines)}\n{words}\n", encoding="utf-8")
    (folder / "comparison.svg").write_text(picture(lines, title), encoding="utf-8")
    return f"{title}\n{table_text(lines)}\n{words}"


def provenance() -> dict[str, Any]:
    """Where and when, and of which commit."""
    return {
        "prefmix": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "machine": machine(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


_PREDICTIONS = ("test", "new_users")


def _portable(settings: CompareSettings) -> dict[str, Any]:
    """Settings with names instead of folders of this machine, and arms without what the registry says of them."""
    values = settings.to_dict()
    for name in ("model", "train_data", "validation_data", "test_data", "new_user_data", "output_dir"):
        values[name] = values[name] and Path(values[name]).name
    values["options"] = {name: value for name, value in settings.options.items() if name != "cache_dir"}
    return values


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
