"""Recipes: YAML 1.2 scalars, overrides that win, and every mistake at once with its line."""

from pathlib import Path

import pytest

from prefmix.cli.recipe import RecipeError, load_recipe, parse_scalar


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.5e-4", 1.5e-4),
        ("-.5", -0.5),
        ("3", 3),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("[global, user]", ["global", "user"]),
        ("[0.1, 1e-1]", [0.1, 0.1]),
        ("2024-01-01", "2024-01-01"),
        (".nan", float("nan")),
        ("a: : b", "a: : b"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    assert parse_scalar(text) == pytest.approx(value, nan_ok=True)
    assert type(parse_scalar(text)) is type(value)


def test_overrides_win_and_everything_else_stays(tmp_path: Path) -> None:
    path = _write(tmp_path, "model: m\nnum_experts: 3\neval_strategy: no\nlearning_rate: 1e-3\n")
    recipe = load_recipe(path, {"num_experts": 5})
    assert recipe.values == {"model": "m", "num_experts": 5, "eval_strategy": "no", "learning_rate": 1e-3}
    assert recipe.lines["num_experts"] == "--num_experts"
    assert recipe.lines["model"] == f"{path}:1"


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "num_expert: 3\nbeta: -1\ngate: [global, prompt]\nlatent: user\nbf16: maybe\n"
        "num_train_epochs: many\nseed: 1\nseed: 2\nmodel: 5\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, {"estep": "exct"}, required=("output_dir",))
    text = str(caught.value)
    for part in (
        f"{path}:1: unknown field 'num_expert' (did you mean 'num_experts'?)",
        f"{path}:2: beta=-1",
        "gate=",
        f"{path}:5: bf16='maybe'",
        f"{path}:6: num_train_epochs='many': expected a number",
        f"{path}:8: seed stands twice",
        f"{path}:9: model=5: expected text",
        "estep='exct'",
        "output_dir: missing",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("- a\n- b\n", "mapping"),
        ("model: [a\nb: c\n", ":2: not YAML"),
        ("model: a\n\tb: c\n", "not YAML"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        load_recipe(_write(tmp_path, text), {})


def test_missing_recipe_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="prefmix init"):
        load_recipe(tmp_path / "none.yaml", {})


def test_fields_of_trl_get_a_hint(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="here it is 'model'"):
        load_recipe(_write(tmp_path, "model_name_or_path: m\n"), {})


def test_fields_of_transformers_that_cannot_work_are_refused_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, {"fp16": True, "trunk": "lora", "gradient_accumulation_steps": 0})
    assert "fp16" in str(caught.value)
    assert "gradient_accumulation_steps=0" in str(caught.value)


def test_choices_of_transformers_are_known_without_importing_it() -> None:
    for name in ("eval_strategy", "save_strategy"):
        with pytest.raises(RecipeError, match=rf"{name}='epochs': expected one of .*did you mean 'epoch'"):
            load_recipe(None, {name: "epochs"})
    assert load_recipe(None, {"lr_scheduler_type": "cosine", "optim": "adamw_torch"}).values["optim"] == "adamw_torch"
