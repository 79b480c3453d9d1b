"""Prompts as token ids, as training tokenized them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from prefmix.data.responses import check_content

Prompt = str | list[dict[str, Any]]


def is_single_prompt(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt (text, or a list of messages) and not a list of prompts."""
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))


def prompt_list(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list.

    Raises:
        ValueError: no prompt at all.
    """
    if not isinstance(prompt, str) and len(prompt) == 0:
        raise ValueError("prompt=[]: give text, a list of messages, or a list of either")
    return cast("list[Prompt]", [prompt] if is_single_prompt(prompt) else list(prompt))


def prompt_token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids after which the response starts.

    Text is tokenized as it stands; messages go through the chat template with its generation prompt. A prompt without
    tokens becomes the token that starts or ends texts, so that something predicts the first token.

    Raises:
        ValueError: what is no message, messages without a chat template, or a prompt that fills the model's context.
    """
    if isinstance(prompt, str):
        token_ids = list(tokenizer(text=prompt)["input_ids"])
    else:
        check_content({"prompt": prompt}, "prompt", _refuse)
        if tokenizer.chat_template is None:
            raise ValueError("prompt is a list of messages, but the tokenizer has no chat template; give text instead")
        encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        token_ids = list(encoded["input_ids"])  # type: ignore[call-overload, arg-type, index]
    if len(token_ids) >= tokenizer.model_max_length:
        raise ValueError(
            f"prompt has {len(token_ids)} tokens and fills the model's context of {tokenizer.model_max_length} tokens; "
            "shorten it"
        )
    if not token_ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        token_ids = [0 if start is None else int(start)]
    return token_ids


def _refuse(field: str, problem: str, remedy: str) -> None:
    raise ValueError(f"{field} {problem}; {remedy[:1].lower()}{remedy[1:].rstrip('.')}")


def users_and_metadata(user: Any, metadata: Any, num: int) -> tuple[list[str | None], list[Mapping[str, Any] | None]]:
    """Users and metadata of `num` rows, from one for all or one for each."""
    if isinstance(metadata, str):
        raise ValueError(f"metadata={metadata!r}: give a mapping of fields, such as {{'user_job': ...}}")
    users = [user] * num if user is None or isinstance(user, str) else list(user)
    entries = [metadata] * num if metadata is None or isinstance(metadata, Mapping) else list(metadata)
    for name, found in (("user", users), ("metadata", entries)):
        if len(found) != num:
            raise ValueError(f"{name}: {len(found)} for {num} texts; give one each, or one for all")
    return users, entries
