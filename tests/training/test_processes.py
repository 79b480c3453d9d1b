"""The number of processes is checked, whatever the launcher says."""

from __future__ import annotations

import pytest

from prefmix.training.processes import check_processes

SILENT = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}


def test_runs_that_are_what_they_seem_pass() -> None:
    check_processes(1, None, {})
    check_processes(1, 1, {"ACCELERATE_MIXED_PRECISION": "no"})  # accelerate launch --num_processes 1
    check_processes(2, None, {"WORLD_SIZE": "2", "RANK": "1"})
    check_processes(2, 2, {**SILENT, "WORLD_SIZE": "2", "RANK": "0"})


def test_processes_that_do_not_know_of_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2: .* each would train alone into one folder; .*torchrun"):
        check_processes(1, None, {"WORLD_SIZE": "2", "RANK": "0"})


def test_a_launcher_that_starts_one_process_in_silence_is_refused() -> None:
    with pytest.raises(ValueError, match="asked for several processes and started one"):
        check_processes(1, None, SILENT)


def test_the_expected_number_is_asserted() -> None:
    with pytest.raises(ValueError, match="num_processes=4: this run has 2 processes"):
        check_processes(2, 4, {"WORLD_SIZE": "2"})
