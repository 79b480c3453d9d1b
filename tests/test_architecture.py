"""The rules of the house that a machine can check: one-way imports, sizes, words, and what stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "prefmix"
FILES = sorted(SOURCE.rglob("*.py"))

# package -> packages that it may import (itself always).
ALLOWED = {
    "mixture": set(),
    "kernels": set(),
    "data": set(),
    "experts": {"kernels", "data"},
    "policy": {"experts", "mixture", "data"},
    "evaluation": {"policy", "data", "mixture", "experts"},
    "training": {"policy", "experts", "mixture", "data", "kernels", "evaluation"},
    "experiments": {"training", "evaluation", "policy", "experts", "mixture", "data", "kernels"},
    "cli": {"experiments", "training", "evaluation", "policy", "experts", "mixture", "data", "kernels"},
}
# What training may see of evaluation: pure functions of log-likelihoods, never the evaluator.
EXCEPTIONS = {
    ("training", "evaluation"): (
        "prefmix.evaluation.metrics",
        "prefmix.evaluation.scoring",
        "prefmix.evaluation.weights",
    )
}
LIGHT_MODULES = (
    "prefmix",
    "prefmix.cli.main",
    "prefmix.cli.train",
    "prefmix.cli.plan",
    "prefmix.cli.fields",
    "prefmix.cli.loading",
    "prefmix.data.schema",
    "prefmix.data.readers",
    "prefmix.data.validation",
    "prefmix.training.options",
    "prefmix.policy.config",
)
HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "pyarrow", "pandas", "scipy", "sklearn")


def _package(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "prefmix" and len(parts) > 1 else None


def _imports(file: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; name the module in full"
            modules.add(node.module or "")
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    faults = []
    for file in (SOURCE / package).rglob("*.py"):
        for module in _imports(file):
            target = _package(module)
            if target in (None, package, "__version__"):
                continue
            allowed = target in ALLOWED[package]
            narrowed = EXCEPTIONS.get((package, target))
            if not allowed or (narrowed and not module.startswith(narrowed)):
                faults.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not faults, "\n".join(faults)


def test_every_package_has_a_rule() -> None:
    packages = {file.relative_to(SOURCE).parts[0] for file in FILES if len(file.relative_to(SOURCE).parts) > 1}
    assert packages == set(ALLOWED)


def test_the_mixture_core_knows_torch_and_no_other_library() -> None:
    allowed = {"torch", "numpy", "jaxtyping", "prefmix", *sys.stdlib_module_names}
    faults = [
        f"{file.name}: {module}"
        for file in (SOURCE / "mixture").rglob("*.py")
        for module in _imports(file)
        if module.split(".")[0] not in allowed
    ]
    assert not faults


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_and_functions_stay_small(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            body = node.body[1:] if has_docstring else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert length <= 50, f"{node.name}: {length} lines"


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_no_file_is_named_for_nothing(name: str) -> None:
    assert not list(SOURCE.rglob(f"{name}*"))


def test_words_of_the_house() -> None:
    """`MixDPO` is another method (arXiv 2601.06180); the field's `router` and `aux_loss` are here gate and ELBO."""
    forbidden = re.compile(r"\bMixDPO\b|\brouters?\b|\baux_loss\b", re.IGNORECASE)
    faults = [str(file.relative_to(ROOT)) for file in _texts() if forbidden.search(file.read_text(encoding="utf-8"))]
    assert not faults


def test_no_file_names_a_place_outside_the_project() -> None:
    """Only .ci/run may look beside the checkout for data sets."""
    outside = re.compile(r"\.\./" + r"shared|/" + r"work/|/" + r"home/\w|/" + r"Users/\w")
    faults = [str(file.relative_to(ROOT)) for file in _texts() if outside.search(file.read_text(encoding="utf-8"))]
    assert not faults


def test_no_pickle_is_loaded_from_a_policy() -> None:
    faults = [file.name for file in (SOURCE / "policy").rglob("*.py") if {"pickle", "joblib"} & _imports(file)]
    faults += [file.name for file in (SOURCE / "policy").rglob("*.py") if "torch.load(" in file.read_text("utf-8")]
    assert not faults


def test_light_modules_stay_light() -> None:
    """What answers before a model is loaded imports nothing that takes a second."""
    code = (
        "import sys, importlib\n"
        f"for name in {LIGHT_MODULES!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def _texts() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".cff", ""}
    files = [ROOT / name for name in listed] or [*FILES, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return [
        file
        for file in files
        if file.suffix in suffixes and file.is_file() and file not in (Path(__file__), ROOT / ".ci" / "run")
    ]
