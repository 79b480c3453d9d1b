"""Checkpoint folders: atomic, verified, rotated; the newest intact one is found and every damaged one named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from prefmix.training import checkpoint


def write(run_dir: Path, step: int, text: str = "content") -> Path:
    staging = checkpoint.staging_folder(run_dir, step)
    staging.mkdir(parents=True)
    for name in (*checkpoint.REQUIRED, "rng_state.pth"):
        (staging / name).write_text(f"{text} {name} {step}")
    return checkpoint.publish(run_dir, step, {"num_experts": 2})


def test_a_published_checkpoint_is_intact_and_complete(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    assert folder.name == "checkpoint-3" and checkpoint.damage(folder) == []
    manifest = checkpoint.read_manifest(folder)
    assert manifest.step == 3 and set(manifest.files) == {*checkpoint.REQUIRED, "rng_state.pth"}
    assert not list(tmp_path.glob(".*"))


def test_publishing_again_replaces_a_damaged_checkpoint(tmp_path: Path) -> None:
    (write(tmp_path, 3, "old") / "optimizer.pt").unlink()
    folder = write(tmp_path, 3, "new")
    assert checkpoint.damage(folder) == [] and "new" in (folder / "optimizer.pt").read_text()


def test_newest_means_the_largest_step_not_the_last_letter(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write(tmp_path, step)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-9",
    ]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    checkpoint.rotate(tmp_path, None, None)
    assert len(checkpoint.checkpoints(tmp_path)) == 5
    checkpoint.rotate(tmp_path, 3, str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-4", "checkpoint-1"]
    checkpoint.rotate(tmp_path, 1, None)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-5"]


def test_leftovers_of_killed_processes_are_ignored_and_cleaned(tmp_path: Path) -> None:
    write(tmp_path, 3)
    for name in (".staging-checkpoint-6", ".deleting-checkpoint-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").write_text("half")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3"]
    checkpoint.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_no_intact_checkpoint_is_a_clear_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint to resume from"):
        checkpoint.newest_intact(tmp_path)
    (write(tmp_path, 3) / "scheduler.pt").unlink()
    (write(tmp_path, 6) / checkpoint.MANIFEST).write_text("{}")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match=r"checkpoint-6: manifest.json.*checkpoint-3: scheduler.pt is missing.*backup"),
    ):
        checkpoint.newest_intact(tmp_path)
    assert "checkpoint-3" in caplog.text and "checkpoint-6" in caplog.text


def test_an_honest_manifest_that_lists_too_little_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    manifest = checkpoint.read_manifest(folder)
    files = {name: digest for name, digest in manifest.files.items() if name != "optimizer.pt"}
    (folder / checkpoint.MANIFEST).write_text(checkpoint._manifest_text(manifest._replace(files=files)))
    assert checkpoint.damage(folder) == ["manifest.json does not list optimizer.pt"]


def test_another_run_is_refused_field_by_field(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    checkpoint.check_identity(folder, {"num_experts": 2})
    with pytest.raises(ValueError, match=r"data_sha256 was None, now 'x'; num_experts was 2, now 3"):
        checkpoint.check_identity(folder, {"num_experts": 3, "data_sha256": "x"})


def test_a_newer_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 2)
        folder = write(tmp_path, 3)
    assert json.loads((folder / checkpoint.MANIFEST).read_text())["format_version"] == 2
    assert checkpoint.damage(folder) == ["manifest.json has format_version 2, this prefmix reads 1"]
