"""Habits from TRL get an answer, not the nearest name."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from prefmix.cli.fields import all_fields
from prefmix.cli.main import main
from prefmix.cli.recipe import RecipeError, load_recipe
from prefmix.cli.trl_names import EXPLAINED, RENAMED, habit

# Where TRL declares what `trl dpo` takes.
DECLARED = {
    "trainer/dpo_config.py": "DPOConfig",
    "trainer/model_config.py": "ModelConfig",
    "scripts/utils.py": "ScriptArguments",
}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--ref_model", "some/model"], "'--ref_model' (not needed: the frozen base is the reference"),
        (["--peft_config", "x.json"], "'--peft_config' (LoRA is part of an expert: branch_depth"),
        (["--lora_r", "16"], "'--lora_r' (here it is 'expert_rank')"),
        (["--lora_target_modules", "q_proj"], "every linear layer of the last branch_depth blocks"),
        (["--loss-weights", "1"], "'--loss_weights' (the loss is the mixture's evidence bound"),
        (["--per_device_batch_size=4"], "(here it is 'per_device_train_batch_size')"),
        (["--max_prompt_length", "512"], "max_length bounds prompt and completion together"),
        (["--num_expert", "4"], "'--num_expert' (did you mean 'num_experts'?)"),
    ],
)
def test_a_flag_of_trl_is_answered_in_one_line(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "recipe.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.count("\n") == 1 and "'16'" not in error


def test_a_recipe_of_trl_gets_the_same_answers() -> None:
    with pytest.raises(RecipeError, match=r"unknown field 'loss_weights' \(the loss is"):
        load_recipe(None, {"loss_weights": "1"})


def test_names_here_exist() -> None:
    assert set(RENAMED.values()) <= all_fields().keys()
    words = {word.strip(".,:;()") for line in EXPLAINED.values() for word in line.split()}
    assert {word for word in words if "_" in word} <= all_fields().keys()


@pytest.mark.parametrize("file", DECLARED)
def test_every_field_of_trl_is_ours_or_answered(file: str) -> None:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    owner = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == DECLARED[file])
    names = [node.target.id for node in owner.body if isinstance(node, ast.AnnAssign)]  # type: ignore[union-attr]
    assert len(names) > 4
    assert [name for name in names if name not in all_fields() and habit(name) is None] == []
