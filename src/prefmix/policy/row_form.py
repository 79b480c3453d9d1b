"""Whether rows are written as those that a policy was trained on: messages in a chat template, or plain text.

A policy reads either, but plain text is another text to it than the same words in a chat template, and its experts
know nothing of it: nothing fails, figures are worse and answers go astray.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from prefmix.policy.prompts import Prompt

MESSAGES, PLAIN = "conversational", "standard"
_NAMES = {MESSAGES: "messages (in the chat template)", PLAIN: "plain text (without the chat template)"}
_ROW_REMEDIES = {
    MESSAGES: 'write them as messages: "prompt": [{"role": "user", "content": PROMPT}], "chosen": [{"role": '
    '"assistant", "content": CHOSEN}], and "rejected" likewise',
    PLAIN: 'write them as plain text: "prompt", "chosen" and "rejected" as strings',
}
_PROMPT_REMEDIES = {
    MESSAGES: 'ask with messages: [{"role": "user", "content": PROMPT}]',
    PLAIN: "ask with plain text, a string (`prefmix generate --raw`)",
}


class RowForm:
    """The form of a policy's training rows; warns of rows or prompts in the other one, once a policy."""

    def __init__(self, trained: str | None) -> None:
        """Args:
        trained: `conversational` or `standard` (plain), `ComparisonTable.form`; anything else: unknown, never warns.
        """
        self._trained = trained
        self._warned = False

    def check_rows(self, form: str | None) -> None:
        """Warns where rows (all have one form) are in the other one.

        Warns:
            UserWarning: naming how to write them.
        """
        self._warn(form, "the rows are", "figures of such rows are not those of this policy", _ROW_REMEDIES)

    def check_prompts(self, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
        """Warns where all prompts to be answered are in the other form; text with special tokens is a template's."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        rendered = any(token in text for text in texts for token in tokenizer.all_special_tokens)
        forms = {PLAIN if isinstance(prompt, str) else MESSAGES for prompt in prompts}
        if len(forms) == 1 and not rendered:
            self._warn(forms.pop(), "the prompt is", "answers are not those that it learnt", _PROMPT_REMEDIES)

    def _warn(self, form: str | None, what: str, effect: str, remedies: dict[str, str]) -> None:
        known = self._trained in _NAMES and form in _NAMES
        if not known or form == self._trained or self._warned:
            return
        assert form is not None and self._trained is not None
        self._warned = True
        warnings.warn(
            f"{what} {_NAMES[form]}, but training rows were {_NAMES[self._trained]}: {effect}; "
            f"{remedies[self._trained]}",
            UserWarning,
            stacklevel=4,
        )
