"""The two things that every writer of folders needs: bytes on the disk, and their hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from prefmix.data.durable_files import file_sha256, sync


def test_files_and_folders_are_synced_and_their_descriptors_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    file.chmod(0o444)  # a copied base model may be read-only
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    sync(file)
    sync(tmp_path)
    assert synced == [file.stat().st_ino, tmp_path.stat().st_ino]
    assert before is None or len(os.listdir("/proc/self/fd")) == before


def test_the_hash_is_of_the_bytes(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
