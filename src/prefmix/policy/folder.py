"""A folder on disk that is either the old one or the new one, intact, whenever the process dies.

A folder is written under a temporary name beside its place, with a SHA-256 manifest, and every file and folder is
forced to the disk. Then the old folder is renamed aside, the new one renamed into place, and the old one deleted. A
kill between the two renames leaves no folder of that name, so readers go through `intact_folder`, which finds the
complete one that waits beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefmix.data.durable_files import file_sha256, sync

CONFIG_FILE = "mixture_config.json"
METADATA_FILE = "gate/metadata.json"
MANIFEST = "manifest.json"
# A model card is for people, who edit it; an edited card must not make a policy unreadable.
# What training took is another number each time, and the same command twice should give the same policy.
RECORD_FILE = "training.json"
LOG_FILE = "metrics.jsonl"  # of a training output
UNHASHED = frozenset({MANIFEST, "README.md", RECORD_FILE})


@contextmanager
def replacing_folder(target: Path, marker: str) -> Iterator[Path]:
    """Yields an empty folder to fill; on a clean exit it becomes `target`, on an exception it is deleted.

    Args:
        target: the folder to make or to replace as a whole.
        marker: a file that every folder of this kind holds; a non-empty folder without it is never replaced.

    Raises:
        ValueError: `target` is a file, or a non-empty folder of another kind.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not _replaceable(target, marker):
        raise ValueError(f"{target}: exists and is not a policy folder (no {marker}); choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.new-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        yield staging
        _write_manifest(staging)
        _alike_readable(staging)
        sync_tree(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _swap(staging, target)


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """As `replacing_folder`, for a folder that must not exist yet (an empty one may).

    Raises:
        ValueError: `target` is a file or holds anything.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists already; choose another folder (nothing is overwritten)")
    with replacing_folder(target, marker=MANIFEST) as staging:
        yield staging


def find_policy(path: str | Path) -> Path:
    """The folder to read for the policy that `path` means: its home, or what a killed save left beside it.

    Raises:
        ValueError: there is none.
    """
    found = intact_folder(policy_home(path), marker=CONFIG_FILE)
    assert found is not None
    return found


def saved_state(folder: Path) -> str | None:
    """What tells one save to a folder from the next: its manifest; None where there is none."""
    try:
        return (folder / MANIFEST).read_text(encoding="utf-8")
    except OSError:
        return None


def check_unchanged(folder: Path | None, state: str | None) -> Path:
    """The folder, for a change that is to be kept in it.

    Raises:
        ValueError: there is none yet, or it is not what it was at `state`: what somebody else saved would be lost.
    """
    if folder is None:
        raise ValueError("save=True: this policy has no folder yet; call save_pretrained(path) first")
    if saved_state(folder) != state:
        raise ValueError(
            f"{folder}: saved by somebody else since it was loaded; load it again and repeat the change (or save to "
            "another folder), so that neither is lost"
        )
    return folder


def policy_home(path: str | Path) -> Path:
    """Where the policy that `path` means is saved: `path` itself, or `policy` in it (a training output).

    Raises:
        ValueError: there is no policy at either place.
    """
    for home in (Path(path), Path(path) / "policy"):
        if intact_folder(home, marker=CONFIG_FILE) is not None:
            return home
    raise ValueError(
        f"{path}: no policy here (no {CONFIG_FILE}); give the folder that training or save_pretrained wrote"
    )


def run_folder(path: Path) -> Path:
    """The training output that `path` is, or whose `policy` it is; a policy without one is its own."""
    path = Path(os.path.abspath(path))
    return path.parent if path.name == "policy" and (path.parent / LOG_FILE).is_file() else path


def intact_folder(path: Path, marker: str) -> Path | None:
    """`path` if it is such a folder, else a complete one that a killed save left beside it, else None."""
    path = Path(os.path.abspath(path))
    if (path / marker).is_file():
        return path
    if path.exists() or not path.parent.is_dir():
        return None
    # A killed swap leaves the complete new folder and the old one; a killed write leaves a new one without manifest.
    for kind in ("new", "old"):
        for candidate in sorted(path.parent.glob(f".{path.name}.{kind}-*"), key=lambda folder: folder.stat().st_mtime):
            if (candidate / marker).is_file() and not damaged_files(candidate):
                return candidate
    return None


def damaged_files(folder: Path) -> list[str]:
    """What is wrong with the files that the folder's manifest names: one line each, nothing if all are intact."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = dict(manifest["sha256"])
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__})"]
    problems = []
    for name, expected in entries.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif file_sha256(folder / name) != expected:
            problems.append(f"{name} has changed since it was saved")
    return problems


def _replaceable(target: Path, marker: str) -> bool:
    return target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))


def _write_manifest(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files}
    hashes = {name: file_sha256(file) for name, file in names.items() if name not in UNHASHED}
    (folder / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")


def _alike_readable(folder: Path) -> None:
    """Gives every file the permissions of one that Python made: safetensors writes for the owner alone."""
    mode = (folder / MANIFEST).stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def sync_tree(folder: Path) -> None:
    """Forces every file and folder in `folder`, and itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _swap(staging: Path, target: Path) -> None:
    if target.exists():
        os.rename(target, target.parent / staging.name.replace(f".{target.name}.new-", f".{target.name}.old-"))
    os.rename(staging, target)
    sync(target.parent)
    for kind in ("new", "old"):
        for leftover in target.parent.glob(f".{target.name}.{kind}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
