"""Stages speak only where somebody watches: a bar on a terminal, one line elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from prefmix.data.stages import stage, stages_shown


def _three(progress: bool = False, total: int = 3) -> None:
    with stage("reading texts", total, "text", progress=progress) as done:
        for _ in range(total):
            done(1)


def test_a_library_is_silent_and_a_log_gets_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    _three()
    with stages_shown():
        _three(total=0)
    assert capsys.readouterr().err == ""
    with stages_shown(), stage("writing", 2, "text"):
        _three()
    assert capsys.readouterr().err == "writing: 2 texts ...\n", "a stage speaks for those within it"
    with stages_shown():
        _three()
    assert capsys.readouterr().err == "reading texts: 3 texts ...\n"
    _three(progress=True)
    assert "3/3" in capsys.readouterr().err, "a notebook, which is no terminal, gets its bar"
    monkeypatch.setenv("TQDM_DISABLE", "1")
    _three(progress=True)
    assert capsys.readouterr().err == "reading texts: 3 texts ...\n"


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with stages_shown():
        _three()
    assert "reading texts: 100%" in capsys.readouterr().err


def test_a_terminal_that_is_zero_wide_gets_a_bar_too() -> None:
    pty = pytest.importorskip("pty")
    code = (
        "import time\nfrom prefmix.data.stages import stage, stages_shown\n"
        "with stages_shown(), stage('reading texts', 2, 'text') as done:\n    done(1); time.sleep(0.3); done(1)"
    )
    ours, theirs = pty.openpty()  # 0 by 0, as terminals are made
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True, timeout=60)
    assert b"reading texts: 100%" in os.read(ours, 10_000)
    os.close(ours)
    os.close(theirs)
