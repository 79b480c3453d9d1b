"""Real dialogues of several turns, judged by invented people who want brief or thorough answers.

The last answers are those of Anthropic's harmless-base test pairs; who prefers which is invented. Legend: B rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.datasets import load_named

TASTES = ("brief", "thorough")
# For tokenizers that have none (chat models bring their own). An answer begins after a line break, where no token of
# the prompt can merge with one of the answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('Human:\n' if message['role'] == 'user' else 'Assistant:\n') + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
MIN_RATIO = 1.5  # of the words of the two last answers: what a person with either taste would notice
MIN_WORDS, MAX_WORDS, MAX_DIALOGUE_WORDS = 3, 40, 90

Row = dict[str, Any]


class Dialogue(NamedTuple):
    """What was said, and two ways to go on.

    Attributes:
        messages: of both sides, the last one from the user.
        short, long: answers.
    """

    messages: list[dict[str, str]]
    short: str
    long: str


def read_dialogues() -> list[Dialogue]:
    """Dialogues with at least two questions, and last answers of clearly different length."""
    found = []
    for row in load_named("hh"):
        sides = [parse(row[name]) for name in ("chosen", "rejected")]
        before, answers = sides[0][:-1], sorted((side[-1]["content"] for side in sides), key=_words)
        total = sum(_words(message["content"]) for message in before)
        asked = sum(message["role"] == "user" for message in before)
        fits = _words(answers[0]) >= MIN_WORDS and _words(answers[1]) <= MAX_WORDS and total <= MAX_DIALOGUE_WORDS
        if before == sides[1][:-1] and asked >= 2 and fits and _words(answers[1]) >= MIN_RATIO * _words(answers[0]):
            found.append(Dialogue(before, *answers))
    return found


def parse(text: str) -> list[dict[str, str]]:
    """Messages of "Human: ... Assistant: ..." as the publisher writes it.

    Raises:
        ValueError: a text that does not begin with "Human:".
    """
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if parts[0].strip() or len(parts) < 3:
        raise ValueError(f"dialogue {text[:40]!r}: expected turns that begin with 'Human:' and 'Assistant:'")
    role = {"Human": "user", "Assistant": "assistant"}
    return [{"role": role[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def judged(dialogues: Sequence[Dialogue], users: int, each: int, rng: np.random.Generator) -> list[Row]:
    """`each` comparisons of every user over dialogues drawn alike for all; user u has the taste u mod 2."""
    rows = []
    for user in range(users):
        for index in rng.permutation(len(dialogues))[:each]:
            dialogue, taste = dialogues[index], TASTES[user % 2]
            answers = [{"role": "assistant", "content": text} for text in (dialogue.short, dialogue.long)]
            chosen, rejected = answers if taste == "brief" else answers[::-1]
            rows.append(
                {
                    "prompt": dialogue.messages,
                    "chosen": [chosen],
                    "rejected": [rejected],
                    "user": f"u{user:02d}",
                    "group": taste,
                }
            )
    return rows


def _words(text: str) -> int:
    return len(text.split())
