"""Which form `prefmix generate` asks in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prefmix.cli.main import main

PLAIN, MESSAGES = "Hello", [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("trained", "template", "flags", "asked"),
    [
        ("standard", "a template", [], PLAIN),
        ("conversational", "a template", [], MESSAGES),
        (None, "a template", [], MESSAGES),
        ("standard", "a template", ["--no-raw"], MESSAGES),
        ("conversational", "a template", ["--raw"], PLAIN),
        ("conversational", None, [], PLAIN),
    ],
)
def test_prompts_are_written_as_training_rows_were(
    trained: str | None, template: str | None, flags: list[str], asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = []

    def generate(prompt: Any, **_: Any) -> str:
        prompts.append(prompt)
        return "Hi."

    policy = SimpleNamespace(
        tokenizer=SimpleNamespace(chat_template=template), config=SimpleNamespace(row_form=trained), generate=generate
    )
    monkeypatch.setattr("prefmix.cli.generate.load_policy", lambda args: policy)
    assert main(["generate", "anywhere", "--prompt", "Hello", *flags]) == 0
    assert prompts == [asked]
