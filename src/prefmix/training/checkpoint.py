"""Checkpoints that a killed process cannot leave half-written and a damaged file cannot slip through.

A checkpoint is written into a staging folder inside the run's folder, every file and folder is forced to the disk, a
manifest with SHA-256 hashes is written last, and the folder is renamed to `checkpoint-<step>`. Reading verifies the
manifest, names what is damaged, and falls back to the newest intact checkpoint. Nothing here knows what a file holds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefmix.data.durable_files import file_sha256, sync

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "trainable.safetensors"
RUN_STATE = "run_state.safetensors"
# What every checkpoint holds; random-number states are one file a process and are checked as listed.
REQUIRED = (WEIGHTS, RUN_STATE, "optimizer.pt", "scheduler.pt", "trainer_state.json")

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STAGING, _DELETING = ".staging-", ".deleting-"

logger = logging.getLogger(__name__)


class Manifest(NamedTuple):
    """What `manifest.json` says.

    Attributes:
        step: optimizer steps done.
        identity: what the run is of (data, base model, shape of the mixture); a resumed run must agree.
        files: name -> SHA-256 of every other file.
    """

    step: int
    identity: Mapping[str, Any]
    files: Mapping[str, str]


def staging_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is prepared; the same path in every process."""
    return run_dir / f"{_STAGING}checkpoint-{step}"


def publish(run_dir: Path, step: int, identity: Mapping[str, Any]) -> Path:
    """Turns the staging folder of `step` into `checkpoint-<step>`, replacing a damaged one of that name."""
    staging, target = staging_folder(run_dir, step), run_dir / f"checkpoint-{step}"
    files = {file.name: file_sha256(file) for file in sorted(staging.iterdir())}
    assert set(REQUIRED) <= set(files), f"a checkpoint holds {REQUIRED}"
    for name in files:
        sync(staging / name)
    (staging / MANIFEST).write_text(_manifest_text(Manifest(step, identity, files)), encoding="utf-8")
    sync(staging / MANIFEST)
    sync(staging)
    if target.exists():
        _delete(target)
    os.rename(staging, target)
    sync(run_dir)
    return target


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first, intact or not."""
    found = [path for path in run_dir.glob("checkpoint-*") if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def rotate(run_dir: Path, limit: int | None, keep: str | None) -> None:
    """Deletes the oldest checkpoints beyond `limit`; the newest and `keep` (the best one) always stay."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(run_dir)
    protected = set(found[:1]) | {path for path in found if keep and path.name == Path(keep).name}
    others = [path for path in found if path not in protected]
    for path in others[max(limit - len(protected), 0) :]:
        _delete(path)


def clean(run_dir: Path) -> None:
    """Removes what killed processes left: half-written and half-deleted checkpoints, which nothing ever reads."""
    for prefix in (_STAGING, _DELETING):
        for leftover in run_dir.glob(f"{prefix}checkpoint-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one line a file; nothing if it is intact."""
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        return [str(error)]
    problems = []
    if checkpoint.name != f"checkpoint-{manifest.step}":
        problems.append(f"{MANIFEST} is of step {manifest.step}, the folder is {checkpoint.name}")
    for name in sorted({*REQUIRED, *manifest.files}):
        if name not in manifest.files:
            problems.append(f"{MANIFEST} does not list {name}")
        elif not (checkpoint / name).is_file():
            problems.append(f"{name} is missing")
        elif file_sha256(checkpoint / name) != manifest.files[name]:
            problems.append(f"{name} is damaged (its SHA-256 is not the one that was saved)")
    return problems


def read_manifest(checkpoint: Path) -> Manifest:
    """Reads and checks `manifest.json`.

    Raises:
        ValueError: it is missing, unreadable, altered, or of another format version.
    """
    try:
        values = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        version, digest = values["format_version"], values.pop("sha256")
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
    if digest != _digest(values):
        raise ValueError(f"{MANIFEST} has been altered since it was saved")
    if version != FORMAT_VERSION:
        raise ValueError(f"{MANIFEST} has format_version {version!r}, this prefmix reads {FORMAT_VERSION}")
    return Manifest(values["step"], values["identity"], values["files"])


def newest_intact(run_dir: Path) -> Path:
    """The newest intact checkpoint; every damaged one that is newer is named in a warning.

    Raises:
        ValueError: there is no checkpoint, or none is intact.
    """
    found, damaged = checkpoints(run_dir), []
    for checkpoint in found:
        problems = damage(checkpoint)
        if not problems:
            return checkpoint
        damaged.append(f"{checkpoint.name}: {'; '.join(problems)}")
        logger.warning("Checkpoint %s is damaged and is not used: %s", checkpoint, "; ".join(problems))
    if damaged:
        raise ValueError(
            f"output_dir={str(run_dir)!r}: no checkpoint is intact ({'. '.join(damaged)}); restore one from a backup "
            "or start anew with overwrite_output_dir=True"
        )
    raise ValueError(
        f"output_dir={str(run_dir)!r}: there is no checkpoint to resume from; train without resume_from_checkpoint, or "
        "give the folder of the interrupted run"
    )


def check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuses to continue a run with other data, another base model or another mixture.

    Raises:
        ValueError: naming every field that differs.
    """
    saved = read_manifest(checkpoint).identity
    names = sorted({*saved, *identity})
    differing = [
        f"{name} was {saved.get(name)!r}, now {identity.get(name)!r}"
        for name in names
        if saved.get(name) != identity.get(name)
    ]
    if differing:
        raise ValueError(
            f"{checkpoint}: belongs to another run ({'; '.join(differing)}); resume with the same data, model and "
            "mixture, or start anew in another output_dir"
        )


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary path beside `file`, forces it to the disk and renames it into place."""
    temporary = file.with_name(f".{file.name}.part")
    write(temporary)
    sync(temporary)
    os.rename(temporary, file)
    sync(file.parent)


def _step(checkpoint: Path) -> int:
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def _delete(checkpoint: Path) -> None:
    """Renamed first, so that a kill in the middle never leaves a checkpoint with some of its files."""
    aside = checkpoint.with_name(_DELETING + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _manifest_text(manifest: Manifest) -> str:
    values = {"format_version": FORMAT_VERSION, **manifest._asdict()}
    return json.dumps({**values, "sha256": _digest(values)}, indent=2) + "\n"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
