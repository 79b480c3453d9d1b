"""What a comparison of arms is asked: data, arms, seeds, one search. Checked before anything heavy is imported."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from prefmix.experiments.arms import LINEAR, TRAINED, Arm, setting_problems
from prefmix.training.options import validate_options

SplitBy = Literal["row", "text", "prompt"]
# Ridges of linear arms: as many of them, from the middle outwards, as the search has candidates for the others.
RIDGES = (10.0, 1.0, 100.0, 30.0, 3.0, 300.0, 0.3, 0.1)
# Fields that a comparison sets itself.
OWN_FIELDS = ("output_dir", "seed", "model", "train_data", "eval_data", "eval_strategy", "save_strategy")


def _field(default: Any, help_text: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class CompareSettings:
    """Fields of `compare.yaml`; each is documented in its help."""

    model: str = _field("smollm2", "Base model: a folder, a hub name, or smollm2.")
    train_data: str = _field("rows.jsonl", "Rows. Alone, they are parted by each seed; see split.")
    validation_data: str | None = _field(None, "Rows that choose options and epochs; null: a part of train_data.")
    test_data: str | None = _field(None, "Reported rows of people whom training knows; null: a part of train_data.")
    new_user_data: str | None = _field(
        None, "Reported rows of people whom training does not see; null: a part of train_data where test_data is null."
    )
    user_column: str | None = _field(None, "Column of all of them that names who judged; null: `user`.")
    output_dir: str = _field("compare", "Folder of results; the same command goes on where it stopped.")
    split: str = _field(
        "row", "What no two parts share. row: nothing; text: responses (mixed rows are dropped); prompt: prompts."
    )
    validation_share: float = _field(0.15, "Share of rows, texts or prompts that choose options and epochs.")
    test_share: float = _field(0.25, "Share that is reported.")
    new_user_share: float = _field(0.15, "Share of people whom training does not see.")
    arms: list[Arm] = _field([], "Names of `prefmix compare --list`; or `my name: {like: mixture, num_experts: 4}`.")
    seeds: list[int] = _field([0, 1, 2], "Each one parts the rows anew and starts all arms anew.")
    num_experts: int = _field(2, "K of every arm that has experts or rewards to choose from.")
    search: dict[str, list[Any]] = _field(
        {"learning_rate": [5e-4, 2e-3]},
        "Grid for every trained arm (validation rows of the first seed choose); linear arms search as many ridges.",
    )
    options: dict[str, Any] = _field({}, "Fields of `prefmix train` for all arms.")

    def candidates(self, arm: Arm) -> list[Arm]:
        """The arm with each point of the grid; its own fields win, so a field it sets is not searched."""
        free = {name: values for name, values in self.search.items() if name not in arm.settings}
        if arm.method in TRAINED:
            free = {name: values for name, values in free.items() if name not in arm.options}
            points = [dict(zip(free, point)) for point in itertools.product(*free.values())]
            return [_with(arm, options=point) for point in points]
        if arm.method in LINEAR and "ridge" not in arm.settings:
            count = max(1, self.budget)
            return [_with(arm, settings={"ridge": ridge}) for ridge in RIDGES[:count]]
        return [arm]

    @property
    def budget(self) -> int:
        """Points of the grid."""
        count = 1
        for values in self.search.values():
            count *= len(values)
        return count

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what cells of one folder must agree on."""
        return asdict(self)

    def common(self) -> dict[str, Any]:
        """What two runs must agree on for their cells to stand in one table: all but arms, seeds and folder."""
        apart = ("arms", "seeds", "output_dir")
        return {name: value for name, value in self.to_dict().items() if name not in apart}


def settings_problems(settings: CompareSettings) -> list[str]:
    """Everything that cannot work, one line each, beginning with the field (or `arms.NAME.FIELD`)."""
    problems = _field_problems(settings)
    names = [arm.name for arm in settings.arms]
    problems += [f"arms: {name!r} stands twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for name in OWN_FIELDS:
        if name in settings.options or name in settings.search:
            problems.append(f"options.{name}: a comparison sets it itself; leave it out")
    if problems:
        return problems
    problems = [f"options.{line}" for line in _option_problems(settings.options)]
    for arm in settings.arms if not problems else ():
        for candidate in settings.candidates(arm):
            found = _option_problems({**settings.options, **candidate.options}) + setting_problems(candidate)
            problems += [line for line in (f"arms.{arm.name}.{entry}" for entry in found) if line not in problems]
    return problems


def _field_problems(settings: CompareSettings) -> list[str]:
    shares = {name: getattr(settings, name) for name in ("validation_share", "test_share", "new_user_share")}
    checks = [(name, 0 <= value < 1, "a share, at least 0 and below 1") for name, value in shares.items()]
    checks += [
        ("validation_share", settings.validation_data is not None or shares["validation_share"] > 0, "above 0"),
        ("split", settings.split in get_args(SplitBy), f"one of {', '.join(get_args(SplitBy))}"),
        ("num_experts", settings.num_experts >= 1, "at least 1"),
        ("seeds", len(settings.seeds) > 0 and len(set(settings.seeds)) == len(settings.seeds), "whole numbers, once"),
        ("arms", len(settings.arms) > 0, "one arm or more; `prefmix compare --list` names them"),
        ("search", all(isinstance(v, list) and v for v in settings.search.values()), "a list of values for each field"),
        ("search", settings.budget <= len(RIDGES), f"at most {len(RIDGES)} points in all"),
    ]
    problems = [f"{name}={getattr(settings, name)!r}: give {remedy}" for name, holds, remedy in checks if not holds]
    if shares["validation_share"] + shares["test_share"] >= 1:
        problems.append("test_share: with validation_share it leaves nothing to train on; give less than 1 in all")
    return problems


def _option_problems(options: Mapping[str, Any]) -> list[str]:
    try:
        validate_options(options)
    except ValueError as error:
        return str(error).splitlines()
    return []


def _with(arm: Arm, options: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None) -> Arm:
    return replace(arm, options={**arm.options, **(options or {})}, settings={**arm.settings, **(settings or {})})
