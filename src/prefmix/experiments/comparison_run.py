"""Trains the arms of a comparison, one cell (arm, seed) at a time; each is a file, so the same command goes on.

The search is the same for every trained arm: each point of the grid is trained on the first seed, the validation rows
choose by log-loss, and the other seeds take that choice. Test rows and new people are only read at the end of a cell.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.stages import stages_shown
from prefmix.data.validation import read_checked
from prefmix.evaluation.report import finite
from prefmix.evaluation.scoring import Predictions
from prefmix.experiments.arm_methods import Workplace, fit
from prefmix.experiments.arm_predictions import Fitted, NewUsers
from prefmix.experiments.arms import Arm
from prefmix.experiments.baselines import tokenize_splits
from prefmix.experiments.compare_settings import CompareSettings
from prefmix.experiments.comparison_pace import Pace
from prefmix.experiments.peak_memory import Memory, PeakMemory
from prefmix.experiments.split_rows import split_rows, validation_part
from prefmix.experts.base_model import BaseModel, load_base

Cell = dict[str, Any]
FORMAT = 1


class PartedRows(NamedTuple):
    """Rows of one seed.

    Attributes:
        train, validation, test: preference rows.
        new_users: of people who stand in no other part; empty where there are none.
        dropped: rows that no part could take.
    """

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    new_users: list[dict[str, Any]]
    dropped: int


class Attempt(NamedTuple):
    """One fit of a candidate.

    Attributes:
        arm: the candidate.
        fitted: what came out.
        validation: its log-loss on the validation rows, nats.
        cpu_seconds: of the fit, cached trunk states not counted.
        memory: of the fit.
    """

    arm: Arm
    fitted: Fitted
    validation: float
    cpu_seconds: float
    memory: Memory


def run_comparison(
    settings: CompareSettings, *, base: BaseModel | None = None, say: Callable[[str], None] = print
) -> list[Cell]:
    """Every cell of the comparison, those found in `output_dir` included.

    Args:
        settings: checked by `settings_problems`.
        base: the base model; None loads `settings.model`.
        say: gets a line for each cell.

    Raises:
        ValueError: rows that cannot be used, or a folder of another comparison.
    """
    folder = Path(settings.output_dir)
    store = CellStore(folder, settings)
    sources = read_sources(settings)
    arms, skipped = usable_arms(settings.arms, sources["train"])
    for name in skipped:
        say(f"{name}: left out, the rows name no `group`")
    if not arms:
        raise ValueError("arms: every one needs a `group` in the rows; add others, or rows that name groups")
    pace = Pace(_fits_to_come(settings, arms, store), say)
    if base is None and any(store.find(arm, seed) is None for arm in arms for seed in settings.seeds):
        say(f"loading {settings.model} ...")
    cells: list[Cell] = []
    total, done = len(arms) * len(settings.seeds), 0
    for seed in settings.seeds:
        place: Workplace | None = None
        for arm in arms:
            done += 1
            cell = store.find(arm, seed)
            if cell is None:
                base = base or load_base(settings.model)
                if place is None:
                    place, rows = workplace(settings, sources, base, seed)
                start = time.perf_counter()
                chosen = store.choice(arm, settings.seeds[0]) if seed != settings.seeds[0] else None
                cell = run_cell(settings, arm, place, chosen, pace.fitted) | {"rows": _sizes(rows)}
                store.write(arm, seed, cell)
                rest = f"; the rest: {pace.rest()}" if pace.rest() else ""
                say(f"[{done}/{total}] {_line(cell)} ({time.perf_counter() - start:.0f} s{rest})")
            else:
                say(f"[{done}/{total}] {_line(cell)} (found)")
            cells.append(cell)
    return cells


def read_sources(settings: CompareSettings) -> dict[str, list[dict[str, Any]] | None]:
    """Checked rows of each source; None where the settings name none."""
    names = {
        "train": settings.train_data,
        "validation": settings.validation_data,
        "test": settings.test_data,
        "new_users": settings.new_user_data,
    }
    read = {name: source and read_checked(source, None, settings.user_column) for name, source in names.items()}
    return {name: found.source.rows if found else None for name, found in read.items()}


def usable_arms(arms: Sequence[Arm], rows: Sequence[Mapping[str, Any]] | None) -> tuple[list[Arm], list[str]]:
    """Arms that these rows can train, the oracle with as many experts as groups; and the names of the others."""
    groups = {row["group"] for row in rows or () if row.get("group") is not None}
    usable = [arm for arm in arms if groups or not arm.needs_groups]
    usable = [
        replace(arm, options={**arm.options, "num_experts": len(groups)}) if arm.true_groups else arm for arm in usable
    ]
    return usable, [arm.name for arm in arms if arm.needs_groups and not groups]


def _fits_to_come(settings: CompareSettings, arms: Sequence[Arm], store: CellStore) -> list[Arm]:
    """The arm of every fit that no cell holds: each point of the grid on the first seed, one on the others."""
    return [
        fit
        for seed in settings.seeds
        for arm in arms
        if store.find(arm, seed) is None
        for fit in (settings.candidates(arm) if seed == settings.seeds[0] else [arm])
    ]


def parted_rows(settings: CompareSettings, sources: Mapping[str, list[dict[str, Any]] | None], seed: int) -> PartedRows:
    """The rows of one seed: parts that have a source of their own are that, the others are parted off train_data."""
    rows, test = sources["train"], sources["test"]
    assert rows is not None
    by: Any = settings.split
    if test is None:
        split = split_rows(
            rows,
            by=by,
            validation_share=settings.validation_share if sources["validation"] is None else 0.0,
            test_share=settings.test_share,
            new_user_share=settings.new_user_share if sources["new_users"] is None else 0.0,
            seed=seed,
        )
        train, validation, test, new = ([rows[i] for i in part] for part in split[:4])
        dropped = split.dropped
    elif sources["validation"] is None:
        chosen = validation_part(rows, by=by, share=settings.validation_share, seed=seed)
        train, validation = ([rows[i] for i in part] for part in chosen[:2])
        new, dropped = [], chosen[2]
    else:
        train, validation, new, dropped = rows, [], [], 0
    return PartedRows(
        list(train), sources["validation"] or list(validation), list(test), sources["new_users"] or new, dropped
    )


def workplace(
    settings: CompareSettings, sources: Mapping[str, list[dict[str, Any]] | None], base: BaseModel, seed: int
) -> tuple[Workplace, PartedRows]:
    """Tables, cached states and options of one seed."""
    rows = parted_rows(settings, sources, seed)
    splits = tokenize_splits(
        rows.train,
        rows.validation,
        rows.test,
        base,
        new_users=rows.new_users or None,
        max_length=settings.options.get("max_length", 1024),
    )
    return Workplace(base, splits, settings.options, Path(settings.output_dir) / "runs", seed), rows


def run_cell(
    settings: CompareSettings,
    arm: Arm,
    place: Workplace,
    chosen: Mapping[str, Any] | None,
    fitted: Callable[[Arm, float], None] = lambda arm, seconds: None,
) -> Cell:
    """Fits an arm (every point of the grid, unless the choice is known) and scores what was held out.

    Args:
        settings: of the comparison.
        arm: what to fit.
        place: tables of this seed.
        chosen: `options` and `settings` that the first seed chose; None: search.
        fitted: is told of every fit and its seconds.
    """
    with stages_shown():
        for table in place.splits:
            if table is not None:
                place.states(table)  # read before any clock runs: all arms share them
    candidates = settings.candidates(arm)
    if chosen is not None:
        candidates = [replace(arm, options=chosen["options"], settings=chosen["settings"])]
    best, searched = None, []
    for candidate in candidates:
        start = time.perf_counter()
        attempt = _attempt(candidate, place)
        fitted(candidate, time.perf_counter() - start)
        searched.append(_searched(arm, attempt))
        if best is None or attempt.validation < best.validation:
            best = attempt
    assert best is not None
    return finite(
        {
            "arm": arm.name,
            "method": arm.method,
            "seed": place.seed,
            "options": dict(best.arm.options),
            "settings": dict(best.arm.settings),
            "search": searched,
            "epoch": best.fitted.epoch,
            "notes": dict(best.fitted.notes),
            "validation_log_loss": best.validation,
            "cpu_seconds": round(best.cpu_seconds, 2),
            "search_cpu_seconds": round(sum(entry["cpu_seconds"] for entry in searched), 2),
            "memory": best.memory._asdict(),
            "test": _scored_test(best.fitted, place),
            "new_users": _scored_new_users(best.fitted, place),
        }
    )


class CellStore:
    """Cells as files; a folder belongs to one comparison (its arms and seeds may grow)."""

    def __init__(self, folder: Path, settings: CompareSettings) -> None:
        """Opens or begins a folder.

        Raises:
            ValueError: the folder holds another comparison.
        """
        self._cells = folder / "cells"
        self._cells.mkdir(parents=True, exist_ok=True)
        identity, found = folder / "comparison.json", {"format": FORMAT, **json.loads(json.dumps(settings.common()))}
        if not identity.is_file():
            identity.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            return
        written = json.loads(identity.read_text(encoding="utf-8"))
        if written != found:
            differing = ", ".join(name for name in sorted(written | found) if written.get(name) != found.get(name))
            raise ValueError(f"output_dir={str(folder)!r} holds a comparison with another {differing}; name another")

    def find(self, arm: Arm, seed: int) -> Cell | None:
        """The finished cell, if it is of this very arm."""
        path = self._path(arm, seed)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def choice(self, arm: Arm, seed: int) -> Cell | None:
        """What the search of the first seed chose."""
        return self.find(arm, seed)

    def write(self, arm: Arm, seed: int, cell: Cell) -> None:
        """Written under another name and renamed: a killed run leaves no half of one."""
        path = self._path(arm, seed)
        staging = path.with_suffix(".part")
        staging.write_text(json.dumps(cell) + "\n", encoding="utf-8")
        staging.replace(path)

    def _path(self, arm: Arm, seed: int) -> Path:
        """A changed arm has another name, so an old result is never taken for it."""
        described = {name: value for name, value in asdict(arm).items() if name not in ("about", "source")}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]
        slug = re.sub(r"[^a-z0-9]+", "-", arm.name.lower()).strip("-")
        return self._cells / f"{slug}-{digest}-seed{seed}.json"


def _attempt(arm: Arm, place: Workplace) -> Attempt:
    memory, start = PeakMemory(), time.process_time()
    fitted = fit(arm, place)
    seconds, used = time.process_time() - start, memory.read()
    table = place.splits.validation
    assert table is not None, "a comparison has validation rows"
    personalised = fitted.predict(table, place.states(table)).personalised
    return Attempt(arm, fitted, float(-personalised.log_prob.mean()), seconds, used)


def _searched(arm: Arm, attempt: Attempt) -> dict[str, Any]:
    given = {**attempt.arm.options, **attempt.arm.settings}
    own = {**arm.options, **arm.settings}
    return {
        "point": {name: value for name, value in given.items() if name not in own},
        "validation_log_loss": attempt.validation,
        "cpu_seconds": round(attempt.cpu_seconds, 2),
        "epoch": attempt.fitted.epoch,
    }


def _scored_test(fitted: Fitted, place: Workplace) -> dict[str, Any]:
    table = place.splits.test
    ways = fitted.predict(table, place.states(table))
    return _people(table, np.ones(len(table), bool)) | {
        name: _numbers(predictions) for name, predictions in ways._asdict().items()
    }


def _scored_new_users(fitted: Fitted, place: Workplace) -> dict[str, Any] | None:
    table = place.splits.new_users
    if table is None:
        return None
    new = NewUsers.of(table, seed=place.seed)
    found = fitted.predict_new(new, place.states(table))
    return _people(table, new.scored) | {"by_context": {str(size): _numbers(found[size]) for size in new.sizes}}


def _people(table: ComparisonTable, rows: np.ndarray) -> dict[str, Any]:
    names = [table.users[user] if user >= 0 else None for user in table.user[rows].tolist()]
    groups = [table.groups[group] if group >= 0 else None for group in table.group[rows].tolist()]
    return {"user": names, "group": groups}


def _numbers(predictions: Predictions) -> dict[str, list[float]]:
    """Six significant digits: decimals would make ties of the reference, whose logits are a sign times 1e-9."""
    return {name: [float(f"{value:.6g}") for value in values] for name, values in predictions._asdict().items()}


def _sizes(rows: PartedRows) -> dict[str, int]:
    parts = {name: len(getattr(rows, name)) for name in ("train", "validation", "test", "new_users")}
    return parts | {"dropped": rows.dropped}


def _line(cell: Cell) -> str:
    logit = np.array(cell["test"]["personalised"]["logit"])
    accuracy = float(np.where(logit == 0, 0.5, logit > 0).mean())
    return f"seed {cell['seed']}, {cell['arm']}: accuracy {accuracy:.3f}, {cell['cpu_seconds']:.1f} CPU s"
