"""Compiles `low_rank.c` with the system's C compiler, once for a processor, and loads it.

No torch headers and no build system: a C file, `cc -shared`, and ctypes over data pointers.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("low_rank.c")
# Some compilers do not know "native" on their processor; the code is right without it, and slower.
_MACHINE = ("-march=native",)
_FLAGS = ("-O3", "-ffp-contract=fast", "-fPIC", "-shared")
_SECONDS = 120


class NoLibraryError(Exception):
    """There is no compiler, or what it made cannot be loaded; the message says which."""


class TilePointer(ctypes.Structure):
    """`Tile` of the C source."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("half", ctypes.c_int32),
        ("tokens", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row", ctypes.c_int64),
    )


class HeadsPointer(ctypes.Structure):
    """`Heads` of the C source."""

    _fields_ = (
        ("low", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("low_stride", ctypes.c_int64),
        ("up_stride", ctypes.c_int64),
        ("up_row", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("rank", ctypes.c_int64),
    )


def load_library(folder: Path | None = None) -> ctypes.CDLL:
    """The library, from the cache where it was compiled before.

    The file's name is a hash of the source, the command and the processor, so it is never stale; it is written under
    another name and renamed, so processes that compile at once do not disturb each other.

    Args:
        folder: where compiled libraries are kept; by default `kernels` in prefmix's cache.

    Raises:
        NoLibraryError: no compiler, a compiler that fails, or a file that cannot be written or loaded.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoLibraryError("no C compiler (cc, gcc, clang) was found")
    try:
        folder = _cache_folder() if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"low_rank-{_key(compiler)}.so"
        if not file.exists():
            _compile(compiler, file)
        return _declared(ctypes.CDLL(str(file)))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        raise NoLibraryError(f"{compiler}: {error}") from error


def _cache_folder() -> Path:
    # As `data.cache_folder`, which kernels, a leaf of the package, do not know; a test compares them.
    chosen = os.environ.get("PREFMIX_CACHE")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(chosen).expanduser() if chosen else user_cache / "prefmix") / "kernels"


def _key(compiler: str) -> str:
    parts = [SOURCE.read_bytes(), compiler.encode(), " ".join(_FLAGS + _MACHINE).encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *sorted(told)])


def _compile(compiler: str, file: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=file.parent) as work:
        made = Path(work) / file.name
        for machine in (_MACHINE, ()):
            command = [compiler, *_FLAGS, *machine, str(SOURCE), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            if done.returncode == 0:
                os.replace(made, file)
                logger.debug("compiled %s", file)
                return
        raise NoLibraryError(f"{' '.join(command)} failed: {done.stderr[-500:]}")


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    tile, heads, pointer, stride = (
        ctypes.POINTER(TilePointer),
        ctypes.POINTER(HeadsPointer),
        ctypes.c_void_p,
        ctypes.c_int64,
    )
    library.prefmix_add_sums.argtypes = [tile, heads, pointer, pointer, stride]
    library.prefmix_add_expectations.argtypes = [tile, heads, pointer, pointer, stride, pointer, pointer, pointer]
    for function in (library.prefmix_add_sums, library.prefmix_add_expectations):
        function.restype = ctypes.c_int
    return library
