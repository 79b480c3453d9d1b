"""People whose rows no earlier version had scored: a run over everybody, less those that `--max-users` drew before.

    mkdir everybody && cp people/search-movielens.json everybody/     # what the smaller run chose, nothing chosen anew
    python recipes/people/run.py --sets movielens --max-users 1000 --work-dir everybody --output everybody/people.json
    python recipes/people/unseen.py --work-dir everybody

Reads the cells of the first command; trains nothing. Differences from single DPO, of all people and of the unseen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Sums, collect, interval
from sets import NAMES, load_set

from prefmix.experiments.comparison_files import provenance

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Both intervals for every method and kind of ids; writes JSON and prints lines."""
    args = _parser().parse_args(arguments)
    everybody = load_set(args.set, max_users=None).users()
    unseen = set(everybody) - set(load_set(args.set, max_users=args.seen).users())
    settings = {"set": args.set, "seeds": args.seeds, "people": len(everybody), "unseen": len(unseen)}
    report: dict[str, Any] = {"settings": settings | provenance()}
    for kind in ("true", "shuffled"):
        # Our own files: numpy arrays beside numbers.
        paths = [args.work_dir / f"cell-{args.set}-{kind}-{seed}.pt" for seed in args.seeds]
        runs = [torch.load(path, weights_only=False) for path in paths]
        report[kind] = {}
        for method in [name for name in runs[0]["methods"] if name != "single"]:
            groups = {"everybody": everybody, "unseen": unseen}
            found = {name: interval(gains(runs, method, people))._asdict() for name, people in groups.items()}
            report[kind][method] = found
            print(kind, method, found)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def gains(runs: Sequence[Mapping[str, Any]], method: str, people: Collection[str]) -> Sums:
    """Sums by person of a method's log-loss less single DPO's, on the rows of some people."""
    cells, wanted = [], set(people)
    for run in runs:
        names = [name for name in run["users"] if name in wanted]
        place = {name: index for index, name in enumerate(names)}
        position = np.array([place.get(name, -1) for name in run["users"]])[run["user"]]
        difference = run["methods"][method]["loss"] - run["methods"]["single"]["loss"]
        cells.append((names, position[position >= 0], difference[position >= 0]))
    return collect(cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Figures of people whose rows had not been scored before.")
    parser.add_argument("--set", choices=NAMES, default="movielens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seen", type=int, default=600, help="--max-users of the earlier runs")
    parser.add_argument("--work-dir", type=Path, default=Path("everybody"), help="cells of the run over everybody")
    parser.add_argument("--output", type=Path, default=RESULTS / "movielens-unseen.json")
    return parser


if __name__ == "__main__":
    main()
