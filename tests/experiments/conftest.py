"""People with opposed tastes over tiny texts, and a tiny model to train on them in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefmix.experts.base_model import BaseModel, content_sha256

NEUTRAL = ["the", "film", "story", "sea", "sky", "girl", "time", "once"]


def opposed_rows(num_users: int = 8, per_user: int = 10, num_texts: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Half of the people choose texts with "loved", half those with "hated"; every text has one of them."""
    rng = np.random.default_rng(seed)
    texts = {
        word: [f" I {word} {' '.join(rng.choice(NEUTRAL, size=3))} {number}" for number in range(num_texts)]
        for word in ("loved", "hated")
    }
    rows = []
    for user in range(num_users):
        liked, other = ("loved", "hated") if user % 2 else ("hated", "loved")
        for _ in range(per_user):
            pair = {"chosen": str(rng.choice(texts[liked])), "rejected": str(rng.choice(texts[other]))}
            rows.append({"prompt": "A review:", **pair, "user": f"u{user}", "group": liked})
    return rows


@pytest.fixture
def tiny_base(make_tiny_model: Callable[..., Any], tiny_chat_tokenizer: Any, tmp_path: Path) -> BaseModel:
    """A random model in a folder, with a chat template."""
    folder = tmp_path / "base"
    model = make_tiny_model()
    model.save_pretrained(folder)
    tiny_chat_tokenizer.save_pretrained(folder)
    return BaseModel(model, tiny_chat_tokenizer, str(folder), content_sha256(model))
