"""A shared base or whole models: what K = 2 experts of each kind cost and are worth.

    python recipes/shared_or_independent/run.py --models stories260K stories15M

README.md beside this file says what to expect. A run that is stopped goes on with the next cell.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cell import KINDS, Task, run_cell

from prefmix.evaluation.intervals import paired_difference
from prefmix.evaluation.plots import ScatterPoint, scatter_svg
from prefmix.evaluation.report import plain_table

FIRST = "heads"  # what the others are compared with


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the cells that are missing, each in a fresh process; prints the table, draws the pictures."""
    args = _parser().parse_args(arguments)
    task = Task(**{name: getattr(args, name) for name in Task._fields})
    if args.cell is not None:
        print(json.dumps(run_cell(args.models[0], args.cell, task, args.work_dir)))
        return {}
    report: dict[str, Any] = {"task": task._asdict(), "vocabulary": "seen", "commit": _commit(), "cells": {}}
    report["machine"] = f"{platform.machine()}, {platform.python_version()}"
    if args.output.is_file():
        report = json.loads(args.output.read_text(encoding="utf-8"))
        if report["task"] != task._asdict():
            raise ValueError(f"--output {args.output} was made with other settings; name another file")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        cells = report["cells"].setdefault(Path(model).name, {})
        for kind in args.kinds:
            if kind not in cells:
                cells[kind] = _in_fresh_process(args, model, kind)
                args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                print(f"{Path(model).name}, {kind}: done", flush=True)
    print(table(report))
    for name, cells in report["cells"].items():
        picture = args.output.with_name(f"{args.output.stem}-{name}.svg")
        picture.write_text(scatter(name, cells), encoding="utf-8")
    return report


def table(report: Mapping[str, Any]) -> str:
    """One line for each model and kind, with the paired difference in accuracy to heads."""
    lines = []
    for model, cells in report["cells"].items():
        for kind, cell in cells.items():
            test = cell["test"]
            lines.append(
                [
                    model,
                    kind,
                    f"{cell['trained_parameters']:,}",
                    f"{cell['served_parameters']:,}",
                    f"{cell['cpu_seconds']:.0f}",
                    f"{cell['peak_memory_mb'] - cell['memory_before_mb']:.0f}",
                    f"{cell['rate']:g}",
                    f"{test['accuracy']['mean']:.3f}",
                    f"{test['log_loss']['mean']:.3f}",
                    _points(cells, kind),
                ]
            )
    header = ["model", "kind", "trained", "served", "CPU s", "MB more", "rate", "accuracy", "log-loss", "to heads"]
    return plain_table(header, lines)


def scatter(model: str, cells: Mapping[str, Any]) -> str:
    """SVG: accuracy against CPU seconds."""
    points = [
        ScatterPoint(kind, "", cell["cpu_seconds"], *(cell["test"]["accuracy"][key] for key in ("mean", "low", "high")))
        for kind, cell in cells.items()
    ]
    return scatter_svg(f"{model}: two experts, two groups", "CPU seconds of a run", "personalised accuracy", points)


def _points(cells: Mapping[str, Any], kind: str) -> str:
    if kind == FIRST or FIRST not in cells:
        return ""
    test, first = cells[kind]["test"], cells[FIRST]["test"]
    d = paired_difference(test["hits"], first["hits"], np.array(test["user"]))
    return f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"


def _in_fresh_process(args: argparse.Namespace, model: str, kind: str) -> dict[str, Any]:
    """`ru_maxrss` never falls, so kinds that shared a process would share the largest one's memory."""
    folder = args.work_dir / f"{Path(model).name}-{kind.replace(', ', '-').replace(' ', '-')}"
    command = [sys.executable, str(Path(__file__).resolve()), "--cell", kind, "--models", model]
    command += ["--work-dir", str(folder)]
    for name in Task._fields:
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{model}, {kind} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Shared base or independent experts: quality against cost.")
    parser.add_argument("--models", nargs="+", default=["smollm2"], help="base models, small ones first")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--users", type=int, default=20, help="half of each group")
    parser.add_argument("--comparisons", type=int, default=12, help="training comparisons of a user")
    parser.add_argument("--num-words", type=int, default=20, help="of the end of each review")
    parser.add_argument("--texts-per-side", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cell", choices=KINDS, help="run this kind alone and print it (internal)")
    parser.add_argument("--work-dir", type=Path, default=Path("shared_or_independent"))
    parser.add_argument("--output", type=Path, default=Path("shared_or_independent/results.json"))
    return parser


if __name__ == "__main__":
    main()
