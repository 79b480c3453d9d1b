"""The prompt and the two responses of a row: plain text, messages, or token ids."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prefmix.data.errors import shown

Report = Callable[[str, str, str], None]  # (field, problem, remedy)
Content = str | list[dict[str, Any]]

# Names that other tools give to the roles of chat templates; a template would drop or misread them without a word.
ROLE_ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
}
ROLES = ("user", "assistant", "system", "developer", "tool")  # templates may know others too
NOT_AN_ANSWER = ("user", "system", "developer")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class TokenIds(NamedTuple):
    """A row that is tokenized already (TRL's column names)."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class Responses(NamedTuple):
    """What was compared. Exactly one of the two forms is there.

    Attributes:
        prompt: what was answered.
        chosen: the preferred response, or the best of a ranking.
        rejected: the other response, or the last of a ranking.
        token_ids: the three as token ids, where they came so.
        between: a ranking's other responses, best first.
        stages: how many places of a ranking were judged; 1 for a pair and for the best of n.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    token_ids: TokenIds | None = None
    between: tuple[Content, ...] = ()
    stages: int = 1

    @property
    def in_order(self) -> tuple[Content, ...]:
        """All responses, best first."""
        return (self.chosen, *self.between, self.rejected)

    @property
    def form(self) -> str:
        """`tokenized`, `conversational` or `standard`."""
        if self.token_ids is not None:
            return "tokenized"
        return "conversational" if isinstance(self.chosen, list) else "standard"


def extract_prompt(chosen: Content, rejected: Content) -> tuple[Content, Content, Content] | None:
    """Splits an implicit prompt off: the longest common beginning, in characters or messages.

    A space at the end of the common text goes to the responses. Where one response is the beginning of the other, the
    last common element stays with the responses, so that both keep something.

    Returns:
        (prompt, chosen, rejected), or None where the two share no beginning.

    Source: TRL 1.16 `extract_prompt`; equal wherever that leaves a prompt.
    """
    split = 0
    for split in range(min(len(chosen), len(rejected))):
        if chosen[split] != rejected[split]:
            if split and chosen[split - 1] == " ":
                split -= 1
            break
    return (chosen[:split], chosen[split:], rejected[split:]) if split else None


def check_responses(row: Mapping[str, Any], tie: bool, report: Report) -> Responses | None:
    """The responses of a row with its prompt made explicit, or None after reporting what is wrong."""
    if any(row.get(column) is not None for column in TOKEN_COLUMNS):
        return _check_token_ids(row, tie, report)
    checks = [check_content(row, name, report) for name in ("chosen", "rejected")]  # both, to report both
    complete = all(checks)
    explicit = row.get("prompt") is not None
    if explicit:
        complete = check_content(row, "prompt", report) and complete
    elif "prompt" in row:
        report("prompt", "is null", "Write the prompt, or leave the column out and begin both responses with it.")
        complete = False
    if not complete:
        return None
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) != isinstance(rejected, list):
        report("rejected", "'chosen' and 'rejected' differ in kind: text and messages", "Use one kind for both.")
        return None
    if chosen == rejected and not tie:
        remedy = "Remove the row, or mark it with `tie: true` (left out, and counted)."
        report("rejected", f"equals 'chosen': {shown(rejected)}", remedy)
        return None
    return _with_prompt(row.get("prompt"), chosen, rejected, tie, report)


def _with_prompt(prompt: Any, chosen: Content, rejected: Content, tie: bool, report: Report) -> Responses | None:
    # Public sets often repeat the prompt as text beside whole conversations: those count as implicit.
    if prompt is not None and isinstance(prompt, list) == isinstance(chosen, list):
        return Responses(prompt, chosen, rejected)
    if isinstance(prompt, list):
        report("prompt", "is a list of messages but the responses are text", "Write the responses as messages too.")
        return None
    if tie and chosen == rejected:
        return Responses("", chosen, rejected)
    split = extract_prompt(chosen, rejected)
    if split is None:
        remedy = "Add a 'prompt' column, or begin both responses with the prompt."
        report("prompt", "is missing, and 'chosen' and 'rejected' share no beginning", remedy)
        return None
    if not split[1] or not split[2]:
        report("rejected", "one response is empty after the shared prompt", "Give both responses an answer.")
        return None
    return Responses(*split)


def check_content(row: Mapping[str, Any], name: str, report: Report) -> bool:
    """Whether `row[name]` is text or messages; reports what is wrong."""
    value = row.get(name)
    what = "the prompt" if name == "prompt" else f"the {'preferred' if name == 'chosen' else 'other'} response"
    if value is None:
        problem = "is null" if name in row else f"is missing (columns: {', '.join(map(str, row)) or 'none'})"
        report(name, problem, f"Give {what} as text or as a list of messages.")
        return False
    if isinstance(value, str):
        if not value and name != "prompt":
            report(name, "is empty", "Remove the row, or write the response.")
            return False
        return True
    if isinstance(value, list):
        return _check_messages(value, name, report)
    problem = f"is {type(value).__name__} {shown(value)}, not text"
    report(name, problem, f"Give {what} as text (in quotes) or as a list of messages.")
    return False


def _check_messages(messages: list[Any], name: str, report: Report) -> bool:
    if not messages:
        report(name, "is an empty list of messages", "Give at least one message with 'role' and 'content'.")
        return False
    checks = [_check_message(message, f"{name}[{i}]", report) for i, message in enumerate(messages)]
    if not all(checks):
        return False
    last = messages[-1]["role"]
    if name != "prompt" and last in NOT_AN_ANSWER:
        report(name, f"ends with a message of role '{last}'", "End both responses with an 'assistant' message.")
        return False
    return True


def _check_message(message: Any, name: str, report: Report) -> bool:
    if not isinstance(message, Mapping):
        report(name, f"is {type(message).__name__} {shown(message)}, not a message", "Write {'role', 'content'}.")
        return False
    role = message.get("role")
    if "role" not in message:
        hint = "Rename 'from' to 'role' and 'value' to 'content'." if "from" in message else "Add 'role': 'user' etc."
        report(name, f"message has no 'role' (keys: {', '.join(map(str, message))})", hint)
        return False
    if not isinstance(role, str) or not role:
        report(name, f"role is {shown(role)}, not a name", "Use 'system', 'user', 'assistant' or 'tool'.")
        return False
    if role in ROLE_ALIASES:
        report(name, f"role '{role}' is unknown to chat templates", f"Rename it to '{ROLE_ALIASES[role]}'.")
        return False
    meant = difflib.get_close_matches(role.casefold(), ROLES, n=1, cutoff=0.75)
    if meant and role not in ROLES:
        report(name, f"role {shown(role)} is unknown to chat templates", f"Write '{meant[0]}'.")
        return False
    return _check_message_content(message, name, report)


def _check_message_content(message: Mapping[str, Any], name: str, report: Report) -> bool:
    content = message.get("content")
    if isinstance(content, str):
        if not content and message["role"] == "assistant" and not message.get("tool_calls"):
            report(name, "the assistant's message is empty", "Remove the row, or write the response.")
            return False
        return True
    if content is None and message.get("tool_calls"):
        return True
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return True
    report(name, f"content is {type(content).__name__} {shown(content)}, not text", "Write the content as text.")
    return False


def _check_token_ids(row: Mapping[str, Any], tie: bool, report: Report) -> Responses | None:
    ids: list[list[int]] = []
    for name in TOKEN_COLUMNS:
        value = row.get(name)
        if not _are_token_ids(value):
            report(name, f"is {shown(value)}, not a list of token ids", f"Give all of {', '.join(TOKEN_COLUMNS)}.")
            return None
        ids.append(list(value or ()))
    for name, value in zip(TOKEN_COLUMNS[1:], ids[1:], strict=True):
        if not value:
            report(name, "is empty", "Remove the row, or give the response at least one token.")
            return None
    if ids[1] == ids[2] and not tie:
        report("rejected_ids", "equals 'chosen_ids'", "Remove the row, or mark it with `tie: true`.")
        return None
    return Responses("", "", "", TokenIds(*ids))


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and all(type(token) is int and token >= 0 for token in value)
