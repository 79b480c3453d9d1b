"""Two real processes over gloo: a launcher, and the runs that one process can repeat."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """runs.py, which the processes run, as a module of this one."""
    spec = importlib.util.spec_from_file_location("prefmix_distributed_runs", HERE / "runs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def launch() -> Callable[..., str]:
    """Runs `torchrun --nproc_per_node 2 ARGUMENTS`, and gives what was printed; fails with it if a process fails."""

    def torchrun(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE), environment.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return done.stdout + done.stderr

    return torchrun


@pytest.fixture(scope="session")
def train_twice(launch: Callable[..., str], runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs scenarios with two processes; gives the folder of what they ended with."""

    def train(*names: str) -> Path:
        folder = tmp_path_factory.mktemp("two")
        launch(runs.__file__, folder, *names)
        return folder

    return train


@pytest.fixture(scope="session")
def train_once(runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs scenarios with one process; gives name -> trainer, its last evaluation, its first parameters."""

    def train(*names: str) -> dict[str, Any]:
        folder, ends = tmp_path_factory.mktemp("one"), {}
        for name in names:
            trainer = runs.make_trainer(folder / name, 1, **runs.SCENARIOS[name])
            start = {k: v.clone() for k, v in trainer._trained_tensors().items()}
            trainer.train()
            ends[name] = (trainer, trainer.evaluate(), start)
        return ends

    return train


@pytest.fixture(scope="module")
def two(train_twice: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    """The folder in which two processes have run every scenario of the module's NAMES, whole and resumed."""
    return train_twice(*request.module.NAMES)


@pytest.fixture(scope="module")
def one(train_once: Callable[..., dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    """What one plain process ends with: it shards nothing and knows nothing of other processes."""
    return train_once(*request.module.NAMES)
