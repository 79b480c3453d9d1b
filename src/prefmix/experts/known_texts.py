"""Which texts of a table have trunk states on disk already, in the cache of another table of the same base.

Training rows, held-out rows and later, larger versions of them are different tables over mostly the same texts.

Legend: N texts of a table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from prefmix.data.comparisons import TextTable
from prefmix.experts.trunk_files import DamagedCache, read_tables

KEY_BYTES = 16


def text_keys(texts: TextTable) -> UInt8[np.ndarray, "N 16"]:
    """A 128-bit hash of each text: its token ids and where its completion starts."""
    keys = np.empty((len(texts), KEY_BYTES), dtype=np.uint8)
    for i, (prompt, completion) in enumerate(zip(texts.prompt_ids, texts.completion_ids, strict=True)):
        content = np.array([len(prompt), *prompt, *completion], dtype=np.int64).tobytes()
        keys[i] = np.frombuffer(hashlib.blake2b(content, digest_size=KEY_BYTES).digest(), dtype=np.uint8)
    return keys


def find_known_texts(
    root: Path, base_key: str, keys: UInt8[np.ndarray, "N 16"]
) -> Iterator[tuple[Path, Int[np.ndarray, "n"], Int[np.ndarray, "n"]]]:
    """Looks through the caches of one base; damaged ones are passed over.

    Args:
        root: folder of all caches.
        base_key: beginning of their names: base weights, type and format.
        keys: of the texts that are wanted.

    Yields:
        A cache folder, the ids of wanted texts that it holds, and their ids there. No text comes twice.
    """
    wanted = {bytes(key): i for i, key in enumerate(keys)}
    for folder in sorted(root.glob(f"{base_key}-*")):
        if not wanted:
            return
        try:
            found = read_tables(folder)["text_keys"].numpy()
        except (DamagedCache, KeyError):
            continue
        pairs = [(wanted.pop(key), there) for there, key in enumerate(map(bytes, found)) if key in wanted]
        if pairs:
            here, there = np.array(pairs, dtype=np.int64).T
            yield folder, here, there
