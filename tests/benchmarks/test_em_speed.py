"""The benchmark's gate can fail, its count of bytes is right, and it runs through."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prefmix.mixture.user_evidence import UserEvidence

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def em_speed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("em_speed")
    sys.modules.pop("em_speed", None)


def test_the_count_of_bytes_is_right(em_speed: ModuleType) -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(1000)
        del first
        return torch.zeros(500) + torch.zeros(500)

    assert em_speed.peak_of(work) == pytest.approx(3 * 4 * 500, abs=500)


def test_a_wrong_answer_is_not_timed(em_speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = UserEvidence.group_evidence
    monkeypatch.setattr(UserEvidence, "group_evidence", lambda self: 2.0 * wrong(self))
    with pytest.raises(AssertionError, match="nothing is timed"):
        em_speed.measure(400, 3, 4, 1)


def test_it_runs_through_and_memory_stays_below_four_tables(
    em_speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["em_speed.py", "--rows", "300000", "--repeats", "1", "--json", str(found)])
    em_speed.main()
    speeds = json.loads(found.read_text())["speeds"]
    assert [s["rows_per_user"] for s in speeds] == [2, 16, 128]
    assert all(s["table_bytes"] == 32 and s["peak_bytes"] < 4 * 32 for s in speeds)
    assert capsys.readouterr().out.count("\n| ") == 5
