"""What a stranger meets first: the environment, the package, and pages that tell the truth."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import sys
import tomllib
from importlib import resources
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml

import prefmix
from prefmix.cli.main import VERBS, verb_parser
from prefmix.cli.recipe import load_recipe
from prefmix.cli.train import REQUIRED

ROOT = Path(__file__).parents[1]
# What comes with transformers and datasets, and what has an installation of its own (its tests are skipped without).
OPTIONAL = {"deepspeed", "tokenizers", "pyarrow"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has an NVIDIA GPU")
def test_no_cuda_package_came_along() -> None:
    names = {(found.metadata["Name"] or "").lower() for found in distributions()}
    assert not {name for name in names if name.startswith(("nvidia-", "triton"))}


def test_what_tests_and_benchmarks_import_is_in_an_extra() -> None:
    """A developer finds by the extras what to install; scikit-learn and PyYAML are imported by other names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    known = {re.split(r"[^\w-]", name)[0].lower().replace("-", "_") for name in stated}
    known |= {"sklearn", "yaml", "harper", "prefmix"} | set(sys.stdlib_module_names)
    files = [file for folder in ("tests", "benchmarks", "recipes", "docs") for file in (ROOT / folder).rglob("*.py")]
    local = {file.stem for file in files} | {folder.name for file in files for folder in file.parents}
    found = {name for file in files for name in _imported(file)} - known - local
    assert found <= OPTIONAL, found - OPTIONAL


def _imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == prefmix.__version__
    assert f"## {prefmix.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_torch_has_no_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = [requirement for requirement in project["dependencies"] if requirement.startswith("torch")]
    assert torch == ["torch>=2.6"]


def test_rows_of_the_demo_ship_with_attribution() -> None:
    folder = resources.files("prefmix.data") / "files" / "convarg"
    assert (folder / "judgements.jsonl.gz").is_file()
    assert "CC-BY 4.0" in (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")


def test_public_names_load_on_first_use() -> None:
    assert set(prefmix.__all__) - {"__version__"} == set(prefmix._HOME)
    assert all(getattr(prefmix, name) is not None for name in prefmix.__all__)
    with pytest.raises(AttributeError, match="MixtureTrianer"):
        _ = prefmix.MixtureTrianer


def test_ci_runs_lint_and_the_suite() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines.index("make lint") < lines.index("make test")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("http")]
    assert all((page.parent / target).exists() for target in local), local


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_pages_is_python(page: Path) -> None:
    for block in _blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_pages_parse(page: Path) -> None:
    for line in "\n".join(_blocks(page, "sh")).splitlines():
        for command in line.split("#")[0].split("&&"):
            words = shlex.split(command)
            if words[:1] == ["prefmix"]:
                verb_parser(words[1]).parse_exact(words[2:])


def test_recipe_of_the_readme_is_sound(tmp_path: Path) -> None:
    (block,) = _blocks(ROOT / "README.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml", {}, REQUIRED)
    assert recipe.values["learning_rate"] == 1e-3


def test_every_verb_has_its_line_in_the_docs() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"| `{verb}" in page for verb in VERBS)


def test_every_public_name_has_its_line_in_the_api_page() -> None:
    from prefmix.policy.mixture_policy import MixturePolicy

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    methods = [name for name in vars(MixturePolicy) if not name.startswith("_")]
    assert not [name for name in methods if f"`{name}" not in page]
    assert not [name for name in prefmix.__all__ if not name.startswith("_") and f"`{name}" not in page]


def test_ten_lines_of_python_are_about_ten() -> None:
    (block,) = _blocks(ROOT / "README.md", "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
