"""What takes long, said to whoever watches: nobody in a library; on the command line a bar, or a line in its place.

Bars are drawn on a terminal; a log gets one line when a stage begins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from prefmix.data.counted import counted

_SHOWN: ContextVar[bool] = ContextVar("stages_shown", default=False)


@contextmanager
def stages_shown() -> Iterator[None]:
    """Within it, stages speak on stderr."""
    token = _SHOWN.set(True)
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def stage(what: str, total: int, unit: str, *, progress: bool = False) -> Iterator[Callable[[int], object]]:
    """Yields a function that is told how many of `total` are done since the last call; stages within it are silent.

    Args:
        what: what is done, such as "reading texts".
        total: how much there is of it; with 0 nothing is said.
        unit: of what, in the singular.
        progress: speak outside of `stages_shown` too, by a bar wherever TQDM_DISABLE is not set.
    """
    wanted = (progress or _SHOWN.get()) and total > 0
    drawn = sys.stderr.isatty() or (progress and not os.environ.get("TQDM_DISABLE"))  # notebooks are no terminals
    token = _SHOWN.set(False)
    try:
        if wanted and drawn:
            from tqdm.auto import tqdm

            with tqdm(total=total, unit=unit, desc=what, file=sys.stderr, **bar_size()) as bar:
                yield bar.update
            return
        if wanted:
            print(f"{what}: {counted(total, unit)} ...", file=sys.stderr, flush=True)
        yield lambda done: None
    finally:
        _SHOWN.reset(token)


def bar_size() -> dict[str, int]:
    """Nothing, for tqdm to find out, but on terminals that say they are 0 by 0 (recorders'), where it draws nothing."""
    try:
        found = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return {}
    return {} if found.columns and found.lines else {"ncols": 80, "nrows": 24}
