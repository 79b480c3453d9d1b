"""Beginnings that texts have in common, as a tree: every shared token stands once.

Legend: N texts, L longest, S spans, T tokens of the tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

# A shared beginning of fewer tokens costs more in further calls than it saves.
SHORTEST_PREFIX = 12


class Span(NamedTuple):
    """Some consecutive tokens that one or more texts have in common, and no other span has.

    Attributes:
        texts: [n] the texts that read them.
        start: position of the first token, the same in all of these texts.
        stop: position after the last.
        parents: numbers of the spans before it, from the beginning of the text; together they hold 0..start.
    """

    texts: np.ndarray
    start: int
    stop: int
    parents: tuple[int, ...]


def prefix_tree(
    ids: Int[np.ndarray, "N L"], lengths: Int[np.ndarray, "N"], shortest: int = SHORTEST_PREFIX
) -> list[Span]:
    """Cuts texts into spans such that a beginning of `shortest` tokens or more that texts share is one span.

    With the texts [1 2 3 4], [1 2 3 5 6] and [7 8], and `shortest=2`:

    ```python
    >>> [(span.texts.tolist(), span.start, span.stop, span.parents) for span in prefix_tree(ids, lengths, shortest=2)]
    [([0, 1], 0, 3, ()), ([0], 3, 4, (0,)), ([1], 3, 5, (0,)), ([2], 0, 2, ())]
    ```

    Which tokens are prompt and which are scored plays no part: what comes before a token is all that it depends on.

    Args:
        ids: token ids, anything in the padding.
        lengths: tokens of each text.
        shortest: fewest tokens worth a span of their own; at least 1.

    Returns:
        Spans, parents first; each text is the concatenation of those that name it.
    """
    assert shortest >= 1 and len(ids) == len(lengths)
    inside = np.arange(ids.shape[1])[None, :] < lengths[:, None]
    padded = np.where(inside, ids, -1)
    # Texts with a common beginning stand together in any order by bytes, whatever the order of the tokens.
    keys = np.ascontiguousarray(padded).view(np.dtype((np.void, padded.dtype.itemsize * padded.shape[1])))[:, 0]
    order = np.argsort(keys, kind="stable")
    differs = (padded[order[1:]] != padded[order[:-1]]) | ~inside[order[1:]]
    common = np.where(differs.any(1), differs.argmax(1), padded.shape[1])
    spans: list[Span] = []
    _grow(spans, order, common, lengths, 0, (), shortest)
    return spans


def _grow(
    spans: list[Span],
    order: np.ndarray,
    common: np.ndarray,
    lengths: np.ndarray,
    depth: int,
    parents: tuple[int, ...],
    shortest: int,
) -> None:
    """Adds the spans from position `depth` on of neighbours `order`, of which each two share `common` tokens."""
    for first, last in _runs(common >= depth + shortest):
        texts, inner = order[first : last + 1], common[first:last]
        stop = int(inner.min()) if len(inner) else int(lengths[texts[0]])
        if stop > depth:
            spans.append(Span(np.sort(texts), depth, stop, parents))
        if len(inner):
            _grow(spans, texts, inner, lengths, stop, (*parents, len(spans) - 1), shortest)


def _runs(joined: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last of each run of neighbours; `joined[i]` says whether i and i + 1 belong together."""
    ends = [*np.flatnonzero(~joined).tolist(), len(joined)]
    first = 0
    for last in ends:
        yield first, last
        first = last + 1
