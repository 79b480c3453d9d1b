"""Options are checked before torch is loaded, all problems at once, each with field, value and remedy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefmix.training.options import expert_head, gate_problems, validate_options


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"num_experts": 0}, "num_experts=0: at least 1"),
        ({"num_experts": "4"}, "num_experts='4': expected a whole number"),
        ({"num_experts": True}, "num_experts=True: expected a whole number"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"beta": [0.1, float("nan")], "num_experts": 2}, "beta=[0.1, nan]"),
        ({"beta": [0.1, 0.2], "num_experts": 3}, "2 values for num_experts=3"),
        ({"label_noise": 0.5}, "label_noise=0.5"),
        ({"latent": "usr"}, "did you mean 'user'?"),
        ({"gate": ["promt"]}, "gate=['promt']: expected a list of one of"),
        ({"gate": []}, "name at least one term"),
        ({"gate": ["user"], "latent": "user"}, "use latent='pair'"),
        ({"gate": ["prompt"], "latent": "user"}, "use latent='pair'"),
        ({"gate": ["prompt"], "gate_update": "fixed"}, "only a purely global gate"),
        ({"gate_prior_alpha": 0.5}, "gate_prior_alpha=0.5"),
        ({"branch_depth": -2}, "branch_depth=-2: a number of blocks"),
        ({"head": "none"}, "head='none' with branch_depth=0"),
        ({"head": "full", "branch_depth": 2}, "head='full' with branch_depth=2"),
        ({"trunk": "lora", "branch_depth": -1}, "no block is left below the experts"),
        ({"trunk": "lora", "cache_states": "disk"}, "use cache_states='auto' or 'off'"),
        ({"branch_depth": 1, "cache_states": "memory"}, "use cache_states='auto' or 'off'"),
        ({"trunk": "full", "bf16": True}, "bf16=true with trunk='full'"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0"),
        ({"trunk_learning_rate": -1.0}, "trunk_learning_rate=-1.0"),
        ({"estep_temperature": 0.0, "estep": "annealed"}, "estep_temperature=0.0"),
        ({"estep_temperature": 2.0}, "no effect"),
        ({"max_length": 1}, "max_length=1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
        ({"fp16": True, "branch_depth": 1}, "bf16=true"),
        ({"label_smoothing_factor": 0.1}, "label_noise"),
        ({"push_to_hub": True}, "output_dir/policy"),
        ({"save_only_model": True}, "cannot be resumed"),
    ],
)
def test_a_bad_option_is_refused_with_field_value_and_remedy(options: dict, part: str) -> None:
    with pytest.raises(ValueError) as error:
        validate_options(options)
    assert part in str(error.value)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ValueError) as error:
        validate_options({"beta": 0.0, "label_noise": 0.9, "branch_depth": -2})
    assert len(str(error.value).splitlines()) == 3


def test_defaults_and_the_combinations_of_the_method_are_accepted() -> None:
    validate_options({})
    for latent, gate in (
        ("user", ["global"]),
        ("user", ["global", "metadata"]),
        ("pair", ["user", "prompt", "metadata"]),
    ):
        validate_options({"latent": latent, "gate": gate})
        assert gate_problems(gate, latent) == []


def test_options_do_not_import_torch() -> None:
    code = "import sys, prefmix.training.options; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "options",
    [
        {"branch_depth": -1},
        {"branch_depth": 4, "head": "hidden", "trunk": "full", "lora_alpha": 8},
        {"branch_depth": 0, "head": "full", "trunk": "lora", "trunk_learning_rate": 1e-5},
        {"branch_depth": 2, "cache_states": "off"},
    ],
)
def test_branches_and_trained_trunks_are_accepted(options: dict) -> None:
    validate_options(options)


def test_auto_head_is_hidden_for_heads_and_none_for_branches() -> None:
    assert [expert_head("auto", depth) for depth in (0, 1, -1)] == ["hidden", "none", "none"]
    assert expert_head("logit", 2) == "logit"
