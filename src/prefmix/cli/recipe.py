"""Reads a recipe (YAML) and its overrides, and reports every mistake at once, each with its line and the nearest name.

Values are YAML 1.2 scalars, because YAML 1.1 reads `1e-3` as text and `eval_strategy: no` as false.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from prefmix.cli.fields import FieldDoc, all_fields
from prefmix.cli.trl_names import habit
from prefmix.training.options import validate_options

_FLOAT = re.compile(r"^[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_IS_KIND = {
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "None": lambda value: value is None,
    "dict": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
}
_PLAIN = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "None": "null"}


# What only `prefmix compare` reads.
COMPARISON_FIELDS = (
    *("arms", "search", "seeds", "options", "split", "validation_data", "test_data", "new_user_data"),
    *("validation_share", "test_share", "new_user_share"),
)


class RecipeError(ValueError):
    """Mistakes in a recipe or its overrides, one a line."""


class Recipe(NamedTuple):
    """A checked recipe.

    Attributes:
        values: field -> value, only what the user set.
        lines: field -> where it was set, `recipe.yaml:3` or `--num_experts`.
    """

    values: dict[str, Any]
    lines: dict[str, str]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_scalar(text: str) -> Any:
    """The value that `text` would have in a recipe: `1e-3` is a number, `[a, b]` a list, `null` nothing."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def load_recipe(path: Path | None, overrides: Mapping[str, Any], required: Iterable[str] = ()) -> Recipe:
    """Merges a YAML file with overrides (which win) and checks every field.

    Args:
        path: the recipe, or None for overrides alone.
        overrides: field -> value, from the command line.
        required: fields without which the run cannot start.

    Raises:
        RecipeError: every unknown field, wrong type, value out of range and refused combination, one a line.
    """
    problems: list[str] = []
    values, lines = _read_yaml(path, problems) if path is not None else ({}, {})
    values |= overrides
    lines |= {name: f"--{name}" for name in overrides}
    values = {name: value for name, value in values.items() if _known(name, lines, problems)}
    for name, value in values.items():
        doc, place = all_fields()[name], lines[name]
        if doc.origin in ("data", "trainer"):  # validate_options knows the types of the others
            problems += _type_problem(doc, value, place)
        if doc.origin in ("run", "trainer"):
            problems += _choice_problem(doc, value, place)
    options = {name: value for name, value in values.items() if all_fields()[name].origin != "data"}
    problems += [_locate(problem, lines) for problem in _option_problems(options)]
    for name in required:
        if values.get(name) is None:
            problems.append(f"{name}: missing; write it in the recipe or give --{name}")
    if problems:
        foreign = path is not None and looks_foreign(path, lines, COMPARISON_FIELDS, all_fields())
        hint = [f"{path} looks like a comparison of arms; run it with: prefmix compare {path}"] if foreign else []
        raise RecipeError("\n".join(hint + problems))
    return Recipe(values, lines)


def looks_foreign(path: Path, lines: Mapping[str, str], telling: Iterable[str], own: Iterable[str]) -> bool:
    """Whether a file's fields are another verb's: two or more that tell it, or one where no other is unknown.

    Args:
        path: the file.
        lines: field -> where it was set; flags do not count.
        telling: fields that only the other verb reads.
        own: fields that this verb reads.
    """
    given = {name for name, line in lines.items() if line.startswith(f"{path}:")}
    unknown = given - set(own)
    found = unknown & set(telling)
    return len(found) > 1 or (len(found) == 1 and found == unknown)


def field_suggestion(name: str, known: Iterable[str]) -> str:
    """What stands for a name of TRL's, in brackets, or else the nearest known name."""
    instead = habit(name)
    return suggestion(name, known) if instead is None else f" ({instead})"


def suggestion(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def compose_mapping(path: Path) -> yaml.MappingNode:
    """The YAML of a file as nodes, which know their lines.

    Raises:
        RecipeError: no such file, or no mapping in it.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe; write one with: prefmix init {path}")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}{_yaml_fault(error)}") from error
    if root is None:
        raise RecipeError(f"{path}: the recipe is empty; write one with: prefmix init")
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is a mapping of `field: value` lines")
    return root


def entries(root: yaml.MappingNode, path: Path, problems: list[str]) -> tuple[dict[str, yaml.Node], dict[str, str]]:
    """Name -> node and name -> `path:line` of a mapping; a name that stands twice is a problem."""
    nodes: dict[str, yaml.Node] = {}
    lines: dict[str, str] = {}
    for key, node in root.value:
        name, line = str(key.value), f"{path}:{key.start_mark.line + 1}"
        if name in nodes:
            problems.append(f"{line}: {name} stands twice (first at {lines[name]}); keep one")
        nodes[name], lines[name] = node, line
    return nodes, lines


def construct(node: yaml.Node) -> Any:
    """The value of a node."""
    return yaml.load(yaml.serialize(node), Loader=_Loader)


def _read_yaml(path: Path, problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    nodes, lines = entries(compose_mapping(path), path, problems)
    return {name: construct(node) for name, node in nodes.items()}, lines


def _yaml_fault(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f":{error.problem_mark.line + 1}: not YAML: {error.problem}"
    return f": not YAML: {error}"


def _known(name: str, lines: Mapping[str, str], problems: list[str]) -> bool:
    if name in all_fields():
        return True
    problems.append(f"{lines[name]}: unknown field {name!r}{field_suggestion(name, all_fields())}")
    return False


def _option_problems(values: Mapping[str, Any]) -> list[str]:
    """All problems: ranges are looked at once types are right, so fields of a wrong type are set aside."""
    problems = _validation_lines(values)
    wrong_types = {line.split("=")[0] for line in problems if ": expected " in line}
    if wrong_types:
        problems += _validation_lines({name: value for name, value in values.items() if name not in wrong_types})
    return problems


def _validation_lines(values: Mapping[str, Any]) -> list[str]:
    try:
        validate_options(values)
    except ValueError as error:
        return str(error).splitlines()
    return []


def _locate(problem: str, lines: Mapping[str, str]) -> str:
    found = re.match(r"\w+", problem)
    line = lines.get(found.group()) if found else None
    return _prefix(line) + problem if line else problem


def _type_problem(doc: FieldDoc, value: Any, line: str) -> list[str]:
    kinds = [re.split(r"[\[ ]", part.strip())[0] for part in doc.kind.split("|")]
    plain = [kind for kind in kinds if kind in _IS_KIND]
    if not plain or any(_IS_KIND[kind](value) for kind in plain):
        return []
    expected = " or ".join(_PLAIN.get(kind, f"a {kind}") for kind in plain)
    return [f"{_prefix(line)}{doc.name}={value!r}: expected {expected}"]


def _choice_problem(doc: FieldDoc, value: Any, line: str) -> list[str]:
    if not doc.choices or not isinstance(value, str) or value in doc.choices:
        return []
    choices = ", ".join(doc.choices) + suggestion(value, doc.choices)
    return [f"{_prefix(line)}{doc.name}={value!r}: expected one of {choices}"]


def _prefix(line: str) -> str:
    """Where in a file a field stands; a flag names itself."""
    return "" if line.startswith("--") else f"{line}: "
