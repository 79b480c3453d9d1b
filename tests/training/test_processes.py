"""The number of processes is checked, whatever the launcher says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import prefmix
from prefmix.training.config import MixtureConfig
from prefmix.training.options import validate_options
from prefmix.training.processes import check_processes
from prefmix.training.zero import zero_problems

PROFILES = sorted((Path(prefmix.__file__).parent / "training" / "profiles").glob("*.yaml"))

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


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_profiles_are_what_accelerate_reads(profile: Path) -> None:
    config: Any = load_config_from_file(str(profile))
    assert config.num_processes == 2
    assert ("deepspeed" in profile.stem) == bool(config.deepspeed_config)
    assert profile.name in profile.read_text(encoding="utf-8").splitlines()[0]  # the command


def test_what_deepspeed_cannot_do_is_refused() -> None:
    def problems(stage: int, **fields: Any) -> str:
        known = {"expert_parallel": False, "expert_kind": "shared_base", "freeze_experts": [], "trunk": "frozen"}
        return "\n".join(zero_problems(stage, cast(MixtureConfig, SimpleNamespace(**(known | fields)))))

    assert not problems(2) and not problems(3) and not problems(2, freeze_experts=[0], expert_kind="independent")
    assert "start it with plain torchrun" in problems(2, expert_parallel=True)
    assert "use expert_parallel=true" in problems(3, expert_kind="independent")
    assert "use zero_stage=2" in problems(3, freeze_experts=[0])
    assert "use trunk='lora'" in problems(3, trunk="full")


def test_expert_parallel_options_that_cannot_work_are_refused() -> None:
    independent: dict[str, Any] = {"expert_kind": "independent", "expert_parallel": True, "num_experts": 2}
    validate_options(independent | {"num_processes": 2})
    with pytest.raises(ValueError, match="start at most num_experts"):
        validate_options(independent | {"num_processes": 3})
    with pytest.raises(ValueError, match="each process has its device"):
        validate_options(independent | {"expert_devices": ["cpu", "cpu"]})
    with pytest.raises(ValueError, match="use expert_kind='independent'"):
        validate_options({"expert_parallel": True})


def test_what_cannot_be_sharded_is_refused() -> None:
    validate_options({"sharding": "fsdp2"})
    for fields in ({"sharding": "fsdp2", "freeze_experts": [0]}, {"fsdp": "full_shard"}):
        with pytest.raises(ValueError, match="sharding="):
            validate_options(fields)


def test_m_step_fields_that_have_no_effect_are_refused() -> None:
    validate_options({"m_step": "sampled", "m_step_samples": 2})
    validate_options({"m_step": "top", "m_step_threshold": 0.5})
    for fields in ({"m_step_samples": 2}, {"m_step": "sampled", "m_step_threshold": 0.5}):
        with pytest.raises(ValueError, match="no effect there"):
            validate_options(fields)
    with pytest.raises(ValueError, match=r"m_step_threshold=1.5: from 0 .* to 1"):
        validate_options({"m_step": "top", "m_step_threshold": 1.5})
