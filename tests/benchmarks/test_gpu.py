"""The GPU benchmark says in one line that there is no GPU, and its code runs through on a CPU with a tiny shape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
TINY = ["--device", "cpu", "--shape", "tiny", "--pairs", "2", "--prompt", "5", "--response", "6", "--steps", "1"]


def run(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_so():
    assert run() == "benchmarks/gpu.py: no CUDA device here, nothing was measured\n"


@pytest.mark.slow
def test_runs_through_on_a_cpu():
    table = run(*TINY, "--without-trl")
    for contender in ("heads K=8, chunked", "heads K=1, eager"):
        assert f"| {contender} |" in table
