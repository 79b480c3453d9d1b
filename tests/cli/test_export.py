"""`prefmix export`: three formats, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prefmix.cli.main import main
from prefmix.experts.base_model import load_base
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy


@pytest.fixture
def policy(tmp_path: Path, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A saved policy of two experts."""
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", dtype=torch.float32)
    config = PolicyConfig((0.1, 0.1), "user", base.source, base.sha256)
    model = MixtureModel(SharedBaseExperts(base.model, 2, rank=2), Gate(2, ("global",)))
    MixturePolicy(model, tiny_tokenizer, config).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.mark.parametrize(
    "options, file",
    [
        (["--format", "peft", "--expert", "1"], "adapter_config.json"),
        (["--format", "merged", "--expert", "0", "--dtype", "bfloat16"], "config.json"),
        (["--format", "servers", "--users"], "mixture.json"),
    ],
    ids=["peft", "merged", "servers"],
)
def test_a_folder_is_written_once(
    policy: Path, tmp_path: Path, options: list[str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(policy), *options, "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert (tmp_path / "out" / file).is_file()
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_over_a_copied_base_what_is_printed_runs_as_printed(
    tmp_path: Path,
    make_tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = MixtureModel(SharedBaseExperts(make_tiny_model(), 2, rank=2), Gate(2, ("global",)))
    config = PolicyConfig((0.1, 0.1), "user", "<model>", "0" * 64)
    MixturePolicy(model, tiny_tokenizer, config).save_pretrained(tmp_path / "out" / "policy")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["export", "../out", "--format", "peft", "--expert", "0", "--output", "ad"]) == 0
    told = capsys.readouterr().err
    assert "a folder of this machine: take it along" in told
    printed = [line for line in told.splitlines() if "PeftModel" in line][-1]
    assert '"../out/policy/base"' in printed
    loaded = eval(printed, {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM})
    assert any("lora" in name for name, _ in loaded.named_parameters())
    named = json.loads(Path("ad/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "out" / "policy" / "base") and Path(named).is_dir()


@pytest.mark.parametrize(
    "options, said",
    [
        (["--format", "peft"], "--expert 0"),
        (["--format", "servers", "--expert", "0"], "leave --expert out"),
        (["--format", "peft", "--expert", "0", "--dtype", "float16"], "only --format merged"),
        (["--format", "merged", "--expert", "0", "--users"], "only --format servers"),
        (["--format", "merged", "--expert", "7"], "experts 0 to 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(
    policy: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(policy), *options, "--output", str(tmp_path / "out")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert not (tmp_path / "out").exists()
