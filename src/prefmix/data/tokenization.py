"""Rows to token ids, equal to those of TRL's `DPOTrainer`, with every distinct text once."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefmix.data.comparisons import ComparisonTable, TextTable
from prefmix.data.errors import DataError, RowError
from prefmix.data.responses import Content, TokenIds
from prefmix.data.schema import CheckedRows, PreferenceRow, check_rows, numbered
from prefmix.data.text_table import SplitText, TextTableBuilder, TruncationMode, common_prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPT_TOO_LONG = "prompt fills max_length"
_BATCH = 1000


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: TruncationMode = "keep_start",
    users: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    where: Callable[[int], str] = numbered,
    source: str = "rows",
    progress: bool = True,
) -> ComparisonTable:
    """Checks and tokenizes preference rows.

    The completion starts where the tokens of prompt and prompt + response part; plain text gets the end-of-sequence
    token, conversations what their template gives. Under `keep_start` a row whose prompt fills `max_length` is left
    out and counted, as in TRL; so are ties and rows of weight 0.

    Args:
        rows: mappings with the columns of `data.schema`.
        tokenizer: the base model's tokenizer.
        max_length: longest prompt plus completion, in tokens; None for no limit.
        truncation_mode: which end of a longer text stays.
        users: user names with fixed indices (the training set's); unknown names are appended.
        groups: group names with fixed indices; unknown names are appended, sorted.
        where: zero-based row -> its place in messages; `RowSource.where` knows lines.
        source: what messages call the data.
        progress: show a progress bar on a terminal.

    Raises:
        DataError: listing every row that cannot be used, or where no row is left.

    Source: TRL 1.16, `DPOTrainer._prepare_dataset` and `DataCollatorForPreference`; the tests compare the two.
    """
    checked = check_rows(rows, where=where, source=source)
    encode = _Encoder(tokenizer, where=where, source=source, progress=progress)
    builder = TextTableBuilder(max_length, truncation_mode, _empty_prompt_id(tokenizer))
    dropped = Counter(checked.dropped)
    kept: list[PreferenceRow] = []
    pairs: list[tuple[int, int]] = []
    errors = []
    for row, ids in zip(checked.rows, encode.rows(checked), strict=True):
        if max_length is not None and truncation_mode == "keep_start" and len(ids.prompt_ids) >= max_length:
            dropped[PROMPT_TOO_LONG] += 1
            continue
        pair = [builder.add(SplitText(ids.prompt_ids, response)) for response in ids[1:]]
        if pair[0] is None or pair[1] is None:
            name = "chosen" if pair[0] is None else "rejected"
            remedy = "Give the response text, give the row a prompt, or raise max_length."
            errors.append(RowError(where(row.source_row), name, "has no token that anything predicts", remedy))
            continue
        kept.append(row)
        pairs.append((pair[0], pair[1]))
    if not kept and not errors:
        problem = f"no row is left: {dropped[PROMPT_TOO_LONG]} prompts fill max_length={max_length}"
        errors.append(RowError("", "prompt", problem, "Raise max_length, or use truncation_mode='keep_end'."))
    if errors:
        raise DataError(source, errors)
    return _table(builder.build(), kept, pairs, users or (), groups or (), dropped)


def tokenize_texts(
    pairs: Iterable[tuple[Content, Content]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> TextTable:
    """Tokenizes (prompt, response) pairs for scoring; entry i of the table is pair i, repeated pairs included.

    A prompt is text or a list of messages; with messages, a response that is text becomes the assistant's message.

    Raises:
        ValueError: where a pair leaves nothing to score.
    """
    encode = _Encoder(tokenizer, where=numbered, source="texts", progress=progress)
    builder = TextTableBuilder(max_length, truncation_mode, _empty_prompt_id(tokenizer))
    arguments = {"tools": tools, **(chat_template_kwargs or {})}
    for index, (prompt, response) in enumerate(pairs):
        if isinstance(prompt, list) and isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        text = encode.text(prompt, response, arguments, index)
        if builder.add(text, reuse=False) is None:
            problem = f"nothing of the response is left within max_length={max_length}"
            raise DataError("texts", [RowError(numbered(index), "response", problem, "Raise max_length.")])
    return builder.build()


def _empty_prompt_id(tokenizer: PreTrainedTokenizerBase) -> int:
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return 0 if token is None else int(token)


class _Encoder:
    """Token ids of prompts and responses; every distinct text is encoded once."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, where: Callable[[int], str], source: str, progress: bool
    ) -> None:
        self._tokenizer, self._where, self._source, self._progress = tokenizer, where, source, progress
        self._seen: dict[str, list[int]] = {}

    def rows(self, checked: CheckedRows) -> Iterable[TokenIds]:
        """TRL's `prompt_ids`, `chosen_ids`, `rejected_ids` of every row, before truncation."""
        if checked.form == "standard":
            self._encode_all(checked.rows)
        parted = 0
        for row in self._bar(checked.rows, "Tokenizing"):
            if row.responses.token_ids is not None:
                yield row.responses.token_ids
                continue
            prompt, chosen, rejected = self._row(row)
            start = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
            parted += start < len(prompt)
            yield TokenIds(prompt[:start], chosen[start:], rejected[start:])
        if parted:
            logger.warning(
                "In %d of %d rows the tokens of the prompt are no prefix of those of prompt + response: tokens merge "
                "across the boundary, or the chat template renders the prompt alone differently. The completion starts "
                "where they part, as in TRL; end prompts on a token boundary to avoid it.",
                parted,
                len(checked.rows),
            )

    def text(self, prompt: Content, response: Content, arguments: Mapping[str, Any], index: int) -> SplitText:
        """One (prompt, response), split where their tokens part."""
        if isinstance(prompt, str) and isinstance(response, str):
            prompt_ids, ids = self._plain(prompt), self._plain(prompt + self._with_eos(response))
        else:
            assert isinstance(prompt, list) and isinstance(response, list)
            prompt_ids = self._chat(prompt, {**arguments, "add_generation_prompt": True}, index)
            ids = self._chat(prompt + response, arguments, index)
        start = common_prefix_length(prompt_ids, ids)
        return SplitText(ids[:start], ids[start:])

    def _row(self, row: PreferenceRow) -> tuple[list[int], list[int], list[int]]:
        prompt, chosen, rejected, _ = row.responses
        if isinstance(prompt, str):
            return tuple(self._plain(text) for text in self._standard(row))  # type: ignore[return-value]
        assert isinstance(chosen, list) and isinstance(rejected, list)
        arguments = {"tools": row.attributes.tools, **row.attributes.chat_template_kwargs}
        return (
            self._chat(prompt, {"add_generation_prompt": True, **arguments}, row.source_row),
            self._chat(prompt + chosen, arguments, row.source_row),
            self._chat(prompt + rejected, arguments, row.source_row),
        )

    def _standard(self, row: PreferenceRow) -> tuple[str, str, str]:
        prompt, chosen, rejected, _ = row.responses
        assert isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)
        return prompt, prompt + self._with_eos(chosen), prompt + self._with_eos(rejected)

    def _with_eos(self, response: str) -> str:
        eos = self._tokenizer.eos_token
        if eos is None:
            raise ValueError(
                "tokenizer.eos_token is None, but plain text rows end with it. Set `tokenizer.eos_token` to the token "
                "at which generation stops, or write the rows as conversations."
            )
        return response if response.endswith(eos) else response + eos

    def _encode_all(self, rows: Sequence[PreferenceRow]) -> None:
        texts = list(dict.fromkeys(text for row in rows for text in self._standard(row)))
        for start in self._bar(range(0, len(texts), _BATCH), "Encoding distinct texts"):
            batch = texts[start : start + _BATCH]
            self._seen.update(zip(batch, self._tokenizer(batch)["input_ids"], strict=True))

    def _plain(self, text: str) -> list[int]:
        if text not in self._seen:
            self._seen[text] = self._tokenizer(text=text)["input_ids"]
        return self._seen[text]

    def _chat(self, messages: list[dict[str, Any]], arguments: Mapping[str, Any], index: int) -> list[int]:
        key = json.dumps([messages, dict(arguments)], default=repr)
        if key not in self._seen:
            if self._tokenizer.chat_template is None and "chat_template" not in arguments:
                remedy = (
                    "Use an instruction-tuned base, set `tokenizer.chat_template`, or write the rows as plain text."
                )
                problem = "is a conversation, but the tokenizer has no chat template"
                raise DataError(self._source, [RowError(self._where(index), "prompt", problem, remedy)])
            try:
                encoded = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)
            except Exception as error:  # templates raise what they like, and all of it concerns this row
                problem = f"the chat template refuses the messages ({error})"
                remedy = "Follow the template's order of roles, and pass only arguments that it knows."
                raise DataError(self._source, [RowError(self._where(index), "prompt", problem, remedy)]) from error
            self._seen[key] = encoded["input_ids"]  # type: ignore[call-overload, assignment, index]
        return self._seen[key]

    def _bar(self, items: Sequence[Any], text: str) -> Iterable[Any]:
        from tqdm.auto import tqdm

        # disable=None: silent where stderr is not a terminal
        return tqdm(items, desc=text, disable=None if self._progress else True, leave=False)


def _table(
    texts: TextTable,
    rows: Sequence[PreferenceRow],
    pairs: Sequence[tuple[int, int]],
    users: Sequence[str],
    groups: Sequence[str],
    dropped: Mapping[str, int],
) -> ComparisonTable:
    attributes = [row.attributes for row in rows]
    user_index = {name: i for i, name in enumerate(users)}
    for entry in attributes:
        if entry.user is not None:
            user_index.setdefault(entry.user, len(user_index))
    group_index = {name: i for i, name in enumerate(groups)}
    for name in sorted({entry.group for entry in attributes if entry.group is not None}):
        group_index.setdefault(name, len(group_index))
    pair = np.array(pairs, dtype=np.int64)
    same = int((pair[:, 0] == pair[:, 1]).sum())
    if same:
        logger.warning("%d of %d rows have equal responses after truncation and teach nothing.", same, len(rows))
    return ComparisonTable(
        texts=texts,
        chosen=pair[:, 0].copy(),
        rejected=pair[:, 1].copy(),
        user=np.array([-1 if a.user is None else user_index[a.user] for a in attributes], dtype=np.int64),
        users=tuple(user_index),
        weight=np.array([a.weight for a in attributes], dtype=np.float32),
        group=np.array([-1 if a.group is None else group_index[a.group] for a in attributes], dtype=np.int64),
        groups=tuple(group_index),
        metadata=[a.metadata for a in attributes],
        source_row=np.array([row.source_row for row in rows], dtype=np.int64),
        dropped=dict(dropped),
    )
