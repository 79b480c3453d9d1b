"""Attention over texts that lie end to end in one row, with beginnings that they share computed once.

A span of tokens attends to the spans before it in its texts and to itself, each by the model's own attention. So there
is no mask over the whole row, no padding, and a shared beginning costs the same however many texts go on from it.

Legend: S spans, A tokens before a span, C tokens of a span, T tokens of the row, H heads, E head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "prefmix_flat"
# How a config says that attention does not reach back to a text's beginning.
_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "local_attention_window", "attention_chunk_size")


class FlatSpan(NamedTuple):
    """One of the pieces that make up the row, in order.

    Attributes:
        length: C.
        parents: numbers of the pieces before it in its texts, from their beginning.
    """

    length: int
    parents: tuple[int, ...]


@contextmanager
def flat_attention(model: PreTrainedModel, spans: Sequence[FlatSpan] | None) -> Iterator[None]:
    """Within this block the model's row is `spans`; None: rows are ordinary. Not for two threads at once."""
    if spans is None:
        yield
        return
    config = model.get_decoder().config
    with _switched(_Row(config, spans, config._attn_implementation, {})):
        yield


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of a checkpoint inside a model: what the backward runs again attends as the forward did."""
    return nullcontext(), nullcontext() if _row is None else _switched(_row)


def takes_spans(model: PreTrainedModel) -> bool:
    """Whether the model's attention is one that takes a mask; whether a flat pass is right is for a run to tell."""
    return getattr(model.get_decoder().config, "_attn_implementation", None) in ("sdpa", "eager")


def longest_text(model: PreTrainedModel) -> int | None:
    """The most tokens over which every layer attends to everything before; None: any number."""
    config = model.get_decoder().config
    windows = [getattr(config, name, None) for name in _WINDOWS]
    found = [value for value in windows if isinstance(value, int) and value > 0]
    used = getattr(config, "use_sliding_window", True)
    return min(found) if found and used else None


class _Row(NamedTuple):
    """The row of tokens that is being read.

    Attributes:
        config: of the decoder; names the attention to call.
        spans: its pieces.
        attention: the model's own.
        masks: by size, since spans of a size and all blocks share them.
    """

    config: Any
    spans: Sequence[FlatSpan]
    attention: str
    masks: dict[Any, Tensor]


_row: _Row | None = None


@contextmanager
def _switched(row: _Row) -> Iterator[None]:
    global _row
    assert row.attention != _NAME, "one row at a time"
    before, _row = _row, row
    row.config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        row.config._attn_implementation_internal = row.attention
        _row = before


def _attend(
    module: nn.Module,
    query: Float[Tensor, "1 H T E"],
    key: Float[Tensor, "1 h T E"],
    value: Float[Tensor, "1 h T E"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Float[Tensor, "1 T H E"], None]:
    """What transformers calls for an attention by our name."""
    assert _row is not None
    attention = _model_attention(module, _row.attention)
    lengths = [span.length for span in _row.spans]
    # Cut once: the backward of a cut is one tensor, that of as many slices as many tensors of zeros.
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    found = []
    for number, span in enumerate(_row.spans):
        reached = (*span.parents, number)
        own, before, content = queries[number], _joined(keys, reached), _joined(values, reached)
        found.append(attention(module, own, before, content, _mask(own, before, _row), **options)[0])
    return torch.cat(found, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)


def _model_attention(module: nn.Module, name: str) -> Callable[..., Any]:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # The eager one stands beside each family's attention module.
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]


def _joined(parts: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    return parts[numbers[0]] if len(numbers) == 1 else torch.cat([parts[number] for number in numbers], dim=2)


def _mask(query: Tensor, key: Tensor, row: _Row) -> Tensor | None:
    """[1, 1, C, A + C] 0 where key j comes at or before query i, j <= A + i, else the least number; None: causal."""
    length, reached = query.shape[2], key.shape[2]
    if length == reached and row.attention == "sdpa":
        return None
    size = (length, reached, query.dtype)
    if size not in row.masks:
        least = torch.finfo(query.dtype).min
        row.masks[size] = query.new_full((length, reached), least).triu_(reached - length + 1)[None, None]
    return row.masks[size]
