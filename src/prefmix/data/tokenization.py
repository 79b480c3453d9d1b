"""Rows to token ids, equal to those of TRL's `DPOTrainer`, with every distinct text once."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from prefmix.data.attributes import Attributes
from prefmix.data.comparisons import ComparisonTable, RankedTexts, TextTable
from prefmix.data.errors import DataError, RowError
from prefmix.data.responses import Content
from prefmix.data.schema import CheckedRows, PreferenceRow, check_rows, numbered
from prefmix.data.stages import bar_size
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
    keep_ties: bool = False,
) -> ComparisonTable:
    """Checks and tokenizes preference rows.

    The completion starts where the tokens of prompt and prompt + response part; plain text gets the end-of-sequence
    token, conversations what their template gives. Under `keep_start` a row whose prompt fills `max_length` is left
    out and counted, as in TRL; so are rows of weight 0, and ties unless `keep_ties`. A row whose label is below 1/2 is
    turned round: its `chosen` is the response that is more likely the better one.

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
        keep_ties: ties are rows of the table.

    Raises:
        DataError: listing every row that cannot be used, or where no row is left.

    Source: TRL 1.16, `DPOTrainer._prepare_dataset` and `DataCollatorForPreference`; the tests compare the two.
    """
    checked = check_rows(rows, where=where, source=source, keep_ties=keep_ties)
    encode = _Encoder(tokenizer, where=where, source=source, progress=progress)
    builder = TextTableBuilder(max_length, truncation_mode, _empty_prompt_id(tokenizer))
    dropped = Counter(checked.dropped)
    kept: list[PreferenceRow] = []
    orders: list[list[int]] = []
    errors = []
    for row, ids in zip(checked.rows, encode.rows(checked), strict=True):
        prompt_ids, *responses = ids
        if max_length is not None and truncation_mode == "keep_start" and len(prompt_ids) >= max_length:
            dropped[PROMPT_TOO_LONG] += 1
            continue
        order = [index for response in responses if (index := builder.add(SplitText(prompt_ids, response))) is not None]
        if len(order) < len(responses):
            name = _emptied(row, builder, prompt_ids, responses)
            remedy = "Give the response text, give the row a prompt, or raise max_length."
            errors.append(RowError(where(row.source_row), name, "has no token that anything predicts", remedy))
            continue
        kept.append(row)
        orders.append(order)
    if not kept and not errors:
        problem = f"no row is left: {dropped[PROMPT_TOO_LONG]} prompts fill max_length={max_length}"
        errors.append(RowError("", "prompt", problem, "Raise max_length, or use truncation_mode='keep_end'."))
    if errors:
        raise DataError(source, errors)
    table = _table(builder.build(), kept, orders, users or (), groups or (), dropped)
    return replace(table, form=checked.form)


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


def _emptied(
    row: PreferenceRow, builder: TextTableBuilder, prompt_ids: list[int], responses: Sequence[list[int]]
) -> str:
    """The column of the first response that truncation leaves nothing of."""
    first = next(i for i, ids in enumerate(responses) if builder.add(SplitText(prompt_ids, ids)) is None)
    if row.responses.between:
        return f"response {first + 1} of {len(responses)}"
    return "rejected" if first else "chosen"


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

    def rows(self, checked: CheckedRows) -> Iterable[Sequence[list[int]]]:
        """TRL's `prompt_ids`, `chosen_ids`, `rejected_ids` of every row, before truncation; more ids for a ranking."""
        if checked.form == "standard":
            self._encode_all(checked.rows)
        parted = 0
        for row in self._bar(checked.rows, "Tokenizing"):
            if row.responses.token_ids is not None:
                yield row.responses.token_ids
                continue
            prompt, *responses = self._row(row)
            start = min(common_prefix_length(prompt, response) for response in responses)
            parted += start < len(prompt)
            yield [prompt[:start], *(response[start:] for response in responses)]
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

    def _row(self, row: PreferenceRow) -> list[list[int]]:
        prompt = row.responses.prompt
        if isinstance(prompt, str):
            return [self._plain(text) for text in self._standard(row)]
        arguments = {"tools": row.attributes.tools, **row.attributes.chat_template_kwargs}
        encoded = [self._chat(prompt, {"add_generation_prompt": True, **arguments}, row.source_row)]
        for response in row.responses.in_order:
            assert isinstance(response, list)
            encoded.append(self._chat(prompt + response, arguments, row.source_row))
        return encoded

    def _standard(self, row: PreferenceRow) -> list[str]:
        prompt = row.responses.prompt
        assert isinstance(prompt, str)
        texts = [prompt]
        for response in row.responses.in_order:
            assert isinstance(response, str)
            texts.append(prompt + self._with_eos(response))
        return texts

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
        return tqdm(items, desc=text, disable=None if self._progress else True, leave=False, **bar_size())


def _table(
    texts: TextTable,
    rows: Sequence[PreferenceRow],
    orders: Sequence[list[int]],
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
    tie, label = _judgements(attributes)
    for i in np.flatnonzero(label < 0.5).tolist():
        orders[i].reverse()
    label = np.maximum(label, 1 - label)
    pair = np.array([(order[0], order[-1]) for order in orders], dtype=np.int64)
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
        tie=tie if tie.any() else None,
        label=label if (label < 1).any() else None,
        ranked=_ranked(rows, orders) if any(len(order) > 2 for order in orders) else None,
    )


def _judgements(attributes: Sequence[Attributes]) -> tuple[np.ndarray, np.ndarray]:
    """[B] which rows are ties, and [B] the label of each, 1 where absent."""
    label = [1.0 if a.label is None else a.label for a in attributes]
    return np.array([a.tie for a in attributes], dtype=bool), np.array(label, dtype=np.float32)


def _ranked(rows: Sequence[PreferenceRow], orders: Sequence[list[int]]) -> RankedTexts:
    return RankedTexts(
        texts=np.array([text for order in orders for text in order], dtype=np.int64),
        size=np.array([len(order) for order in orders], dtype=np.int64),
        stages=np.array([row.responses.stages for row in rows], dtype=np.int64),
    )
