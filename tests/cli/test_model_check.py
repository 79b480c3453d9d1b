"""Base models are judged from their files: missing, damaged and foreign ones are named before torch is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefmix.cli.model_check import check_model


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A sound model folder."""
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_sound_folder(folder: Path) -> None:
    assert "llama" in check_model(str(folder))


def test_weights_cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged or cut off"):
        check_model(str(folder))


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{}"])
def test_weights_that_are_none(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or cut off"):
        check_model(str(folder))


@pytest.mark.parametrize(
    ("name", "part"), [("config.json", "config.json is missing"), ("model.safetensors", "no weights")]
)
def test_missing_files(folder: Path, name: str, part: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=part):
        check_model(str(folder))


def test_no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        check_model(str(folder))


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        check_model(str(folder))


def test_code_of_a_model_needs_trust(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoModel": "m.M"}}')
    with pytest.raises(ValueError, match="trust_remote_code"):
        check_model(str(folder))
    assert check_model(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("name", ["./none", "none/at/all", "org/unknown-model"])
def test_unknown_names_without_a_network(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        check_model(name)
