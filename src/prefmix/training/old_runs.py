"""What an earlier run left in an output folder, which a fresh run never mixes with, nor overwrites unasked."""

from __future__ import annotations

import shutil
from pathlib import Path

from prefmix.training import checkpoint as store

FINISHED = "finished.json"
POLICY = "policy"


def left_over(run_dir: Path) -> list[Path]:
    """Checkpoints, newest first, the mark of a finished run and its policy: what is there of them."""
    return [
        *store.checkpoints(run_dir),
        *(run_dir / name for name in (FINISHED, POLICY) if (run_dir / name).exists()),
    ]


def refusal(run_dir: Path) -> str | None:
    """Why a fresh run cannot go there, with the remedies; None: it can."""
    old = left_over(run_dir)
    if not old:
        return None
    kind = "a finished" if (run_dir / FINISHED).exists() else "an unfinished"
    return (
        f"output_dir={str(run_dir)!r} holds {kind} run ({old[0].name}); continue it with "
        "resume_from_checkpoint=True, choose another folder, or replace it with overwrite_output_dir=True"
    )


def make_room(run_dir: Path, overwrite: bool) -> None:
    """Empties a folder for a fresh run.

    Raises:
        ValueError: it holds a run, and not `overwrite`.
    """
    store.clean(run_dir)
    problem = refusal(run_dir)
    if problem is not None and not overwrite:
        raise ValueError(problem)
    for path in sorted(left_over(run_dir), key=lambda path: path.name != FINISHED):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
