"""One cache folder for downloads, converted models and trunk states, where the environment wants it."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmix.data import datasets
from prefmix.data.cache_folder import cache_folder
from prefmix.experts import smollm2, trunk_cache


def test_our_variable_comes_first_then_the_user_s_cache_then_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PREFMIX_CACHE", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "prefmix"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "prefmix"
    monkeypatch.setenv("PREFMIX_CACHE", "~/ours")
    assert cache_folder() == tmp_path / "home" / "ours"
    assert cache_folder().is_dir()


def test_everything_that_is_kept_is_kept_there():
    assert {module.cache_folder for module in (datasets, smollm2, trunk_cache)} == {cache_folder}
