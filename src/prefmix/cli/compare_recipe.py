"""Reads `compare.yaml`: every mistake at once, each with its line and the nearest name; and writes a commented one."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from prefmix.cli.fields import all_fields
from prefmix.cli.recipe import (
    RecipeError,
    compose_mapping,
    construct,
    entries,
    field_suggestion,
    looks_foreign,
    suggestion,
)
from prefmix.experiments.arms import SETTINGS, Arm, all_arms, find_arm, with_options
from prefmix.experiments.compare_settings import CompareSettings, settings_problems

_KINDS: dict[Any, tuple[Any, str]] = {
    str: (str, "text"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
}


class _Reader:
    """One file, and what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path, self.problems = path, list[str]()
        self.lines: dict[str, str] = {}

    def settings(self, overrides: Mapping[str, Any]) -> CompareSettings:
        nodes, self.lines = entries(compose_mapping(self.path), self.path, self.problems)
        hints, values = get_type_hints(CompareSettings), dict[str, Any]()
        for name, node in nodes.items():
            if name not in hints:
                self.problems.append(f"{self.lines[name]}: unknown field {name!r}{suggestion(name, hints)}")
            elif name != "arms":
                values[name] = self._value(name, node, hints[name])
        values |= overrides
        for name in ("options", "search"):
            self._known_fields(name, nodes.get(name), values.get(name, {}))
        count = values.get("num_experts", CompareSettings.num_experts)
        if "arms" in nodes and isinstance(count, int):
            values["arms"] = self._arms(nodes["arms"], max(count, 1))
        if not self.problems:
            settings = CompareSettings(**values)
            self.problems += [self._located(line) for line in settings_problems(settings)]
        if self.problems:
            own = {name: self.lines[name] for name in nodes}
            foreign = "arms" not in nodes and looks_foreign(self.path, own, all_fields(), hints)
            hint = f"{self.path} looks like a recipe of one training; run it with: prefmix train {self.path}"
            raise RecipeError("\n".join([hint] * foreign + self.problems))
        return settings

    def _value(self, name: str, node: yaml.Node, hint: Any) -> Any:
        value = construct(node)
        kinds = {list[int]: "a list of whole numbers", dict[str, Any]: "a mapping", dict[str, list[Any]]: "a mapping"}
        if hint in kinds:
            holds = isinstance(value, dict) or (hint == list[int] and _whole_numbers(value))
            expected = kinds[hint]
        else:
            kind, expected = _KINDS.get(hint, ((str, type(None)), "text or null"))
            holds = isinstance(value, kind) and not isinstance(value, bool)
        if not holds:
            self.problems.append(f"{self.lines[name]}: {name}={value!r}: expected {expected}")
        return value

    def _known_fields(self, name: str, node: yaml.Node | None, values: Any) -> None:
        """Options and search name fields of `prefmix train`."""
        where = entries(node, self.path, self.problems)[1] if isinstance(node, yaml.MappingNode) else {}
        self.lines |= {f"{name}.{field}": line for field, line in where.items()}
        for field in values if isinstance(values, dict) else ():
            if field not in all_fields():
                line = where.get(field, name)
                self.problems.append(f"{line}: unknown field {field!r}{field_suggestion(field, all_fields())}")

    def _arms(self, node: yaml.Node, num_experts: int) -> list[Arm]:
        known, arms = all_arms(num_experts), []
        if not isinstance(node, yaml.SequenceNode):
            self.problems.append(f"{self.lines['arms']}: arms: expected a list of names")
            return []
        for item in node.value:
            line = f"{self.path}:{item.start_mark.line + 1}"
            try:
                arms += self._arm(item, known, line)
            except ValueError as error:
                self.problems.append(f"{line}: {error}")
        return arms

    def _arm(self, item: yaml.Node, known: Mapping[str, Arm], line: str) -> list[Arm]:
        if isinstance(item, yaml.ScalarNode):
            arm = find_arm(str(construct(item)), known)
            self.lines[f"arms.{arm.name}"] = line
            return [arm]
        if not isinstance(item, yaml.MappingNode) or len(item.value) != 1:
            raise ValueError("an arm is a name, or `name: {like: mixture, field: value}`")
        key, node = item.value[0]
        name = str(key.value)
        self.lines[f"arms.{name}"] = line
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{name}: expected a mapping of fields")
        nodes, lines = entries(node, self.path, self.problems)
        given = {field: construct(value) for field, value in nodes.items()}
        self.lines |= {f"arms.{name}.{field}": place for field, place in lines.items()}
        like = find_arm(str(given.pop("like", name)), known)
        settings = [setting for method in SETTINGS.values() for setting in method]
        for field in given:
            if field not in all_fields() and field not in settings:
                near = field_suggestion(field, [*all_fields(), *settings])
                self.problems.append(f"{lines[field]}: unknown field {field!r}{near}")
        return [with_options(like, name, given)]

    def _located(self, problem: str) -> str:
        """The line of the longest field that the problem begins with."""
        fields = [name for name in self.lines if problem.startswith((f"{name}.", f"{name}=", f"{name}:", f"{name} "))]
        return f"{self.lines[max(fields, key=len)]}: {problem}" if fields else problem


def load_comparison(path: Path, overrides: Mapping[str, Any]) -> CompareSettings:
    """A checked `compare.yaml`.

    Args:
        path: the file.
        overrides: field -> value, from the command line.

    Raises:
        RecipeError: every mistake, one a line.
    """
    return _Reader(path).settings(overrides)


def example_text() -> str:
    """A commented `compare.yaml`: every field with its help, every arm with its line."""
    shown: dict[str, Any] = {"search": CompareSettings(arms=[]).search, "seeds": [0, 1, 2]}
    lines = ["# Arms side by side: prefmix compare compare.yaml --dry_run, then without it.", ""]
    for field in dataclasses.fields(CompareSettings):
        lines += [f"# {line}" for line in textwrap.wrap(str(field.metadata["help"]), 110)]
        if field.name == "arms":
            lines += ["arms:", *(_arm_line(name, arm) for name, arm in all_arms().items())]
            lines += ["  # - my mixture: {like: mixture, num_experts: 4, gate_prior_alpha: 2}", ""]
            continue
        if field.name == "options":
            lines += ["options:", "  num_train_epochs: 4", "  per_device_train_batch_size: 32", ""]
            continue
        value = shown.get(field.name, field.default)
        mark = "# " if value is None else ""
        lines += [f"{mark}{field.name}: {value if isinstance(value, str) else json.dumps(value)}", ""]
    return "\n".join(lines)


def _arm_line(name: str, arm: Arm) -> str:
    source = f" ({arm.source})" if arm.source else ""
    return f"  - {name:16}  # {arm.about}{source}"


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
