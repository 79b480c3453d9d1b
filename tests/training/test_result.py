"""What a run leaves behind: users' rows of the gate at their MAP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
OPTIONS: dict[str, Any] = {"gate": ["global", "user"], "latent": "pair", "learning_rate": 0.05, "beta": 1.0}


def test_the_policy_keeps_how_its_rows_were_written_and_held_out_rows_of_the_other_form_are_a_warning(
    make_trainer: Make, make_tiny_model: Any, tiny_chat_tokenizer: Any, rows: Any, tmp_path: Path
) -> None:
    def said(text: str, role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chats = [row | {name: said(row[name], role) for name, role in roles.items()} for row in rows]
    args = MixtureConfig(str(tmp_path / "chats"), cache_states="memory", probe_dim=4, use_cpu=True, disable_tqdm=True)
    with pytest.warns(UserWarning, match="the rows are plain text.*training rows were messages"):
        trainer = MixtureTrainer(make_tiny_model(), args, chats, rows, tiny_chat_tokenizer)
    assert trainer.policy.config.row_form == "conversational"
    assert make_trainer().policy.config.row_form == "standard"
