"""Peak memory of a piece of work within a process: the kernel's high-water mark, reset before it (Linux)."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """What a piece of work needed.

    Attributes:
        peak_mib: largest resident set of the process during the work, base model and states included.
        extra_mib: how much of it came on top of what was resident before.
        how: how it was measured.
    """

    peak_mib: float
    extra_mib: float
    how: str


class PeakMemory:
    """Starts a measurement; `read` ends it.

    Where the kernel's mark cannot be reset, the peak is `ru_maxrss`, the largest resident set since the process began:
    an upper bound, and `how` says so.
    """

    def __init__(self) -> None:
        gc.collect()
        self._resettable = _reset()
        self._before = _status("VmRSS") if self._resettable else _largest()

    def read(self) -> Memory:
        """The peak since the start."""
        peak = _status("VmHWM") if self._resettable else _largest()
        how = "VmHWM after clear_refs" if self._resettable else "ru_maxrss of the whole process (upper bound)"
        return Memory(round(peak, 1), round(max(peak - self._before, 0.0), 1), how)


def _reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def _largest() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
