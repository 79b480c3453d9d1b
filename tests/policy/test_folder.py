"""A folder is the old one or the new one, intact, wherever the process is killed."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from prefmix.policy.folder import CONFIG_FILE, damaged_files, find_policy, intact_folder, replacing_folder


def write(target, value):
    with replacing_folder(target, CONFIG_FILE) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(value))
        (folder / "expert_0").mkdir()
        (folder / "expert_0" / "head.safetensors").write_bytes(bytes([value] * 100))


def value_of(folder):
    value = json.loads((folder / CONFIG_FILE).read_text())
    assert (folder / "expert_0" / "head.safetensors").read_bytes() == bytes([value] * 100)
    return value


def die_at_operation(number):
    """The process ends, without any clean-up, just before its n-th write to the disk's structure."""
    left = [number]

    def dying(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os._exit(17)
            return function(*args, **kwargs)

        return call

    os.fsync, os.rename, os.mkdir = dying(os.fsync), dying(os.rename), dying(os.mkdir)
    shutil.rmtree = dying(shutil.rmtree)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("first", [False, True], ids=["replacing", "first save"])
def test_killed_at_any_operation_an_intact_folder_remains(tmp_path, first):
    survived, number = False, 0
    while not survived:
        target = tmp_path / f"run{number}" / "policy"
        if not first:
            write(target, 1)
        child = os.fork()
        if child == 0:
            die_at_operation(number)
            write(target, 2)
            os._exit(0)
        survived = os.waitpid(child, 0)[1] == 0
        found = intact_folder(target, CONFIG_FILE)
        if found is None:
            assert first and not survived, f"killed at operation {number}: no policy can be found"
        else:
            assert damaged_files(found) == []
            assert value_of(found) in ((2,) if first or survived else (1, 2))
        write(target, 3)
        assert value_of(intact_folder(target, CONFIG_FILE)) == 3
        assert [path.name for path in target.parent.iterdir()] == ["policy"], "leftovers of the killed save remain"
        number += 1
    assert number > 6


def test_an_error_while_writing_leaves_the_old_folder_and_no_rest(tmp_path):
    write(tmp_path / "policy", 1)
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "policy", CONFIG_FILE) as folder:
        (folder / CONFIG_FILE).write_text("half")
        raise RuntimeError
    assert value_of(tmp_path / "policy") == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_not_a_policy_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="not a policy"):
            write(tmp_path / name, 1)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", 1)
    assert value_of(tmp_path / "empty") == 1


def test_every_kind_of_damage_is_named(tmp_path):
    write(tmp_path / "policy", 1)
    head = tmp_path / "policy" / "expert_0" / "head.safetensors"
    head.write_bytes(b"\x03" + head.read_bytes()[1:])
    assert damaged_files(tmp_path / "policy") == ["expert_0/head.safetensors has changed since it was saved"]
    head.unlink()
    assert damaged_files(tmp_path / "policy") == ["expert_0/head.safetensors is missing"]
    (tmp_path / "policy" / "manifest.json").write_text("{")
    assert "cannot be read" in damaged_files(tmp_path / "policy")[0]
    (tmp_path / "policy" / "manifest.json").unlink()
    assert damaged_files(tmp_path / "policy") == ["manifest.json is missing"]


def test_the_card_may_be_edited(tmp_path):
    with replacing_folder(tmp_path / "policy", CONFIG_FILE) as folder:
        (folder / CONFIG_FILE).write_text("{}")
        (folder / "README.md").write_text("card")
    (tmp_path / "policy" / "README.md").write_text("a better card")
    assert damaged_files(tmp_path / "policy") == []


def test_a_training_output_leads_to_its_policy(tmp_path):
    write(tmp_path / "out" / "policy", 1)
    assert find_policy(tmp_path / "out") == tmp_path / "out" / "policy"
    with pytest.raises(ValueError, match="no policy here"):
        find_policy(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX")
def test_whoever_may_read_one_file_may_read_all(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing_folder(tmp_path / "policy", marker=CONFIG_FILE) as folder:
            (folder / CONFIG_FILE).write_text("{}")
            (folder / "expert_0").mkdir()
            private = folder / "expert_0" / "head.safetensors"
            private.write_bytes(b"x")
            private.chmod(0o600)
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "policy").rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
