"""What recipes run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def base_folder(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    make_tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
