"""Real people: what is gained by knowing who judges? Arguments, jokes and films; types, blends, and shuffled ids.

    python recipes/people/run.py --model smollm2               all sets, three seeds; finished cells are kept
    python recipes/people/run.py --sets jester --seeds 0       a glimpse

README.md beside this file says what is measured and what came out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import linear
import numpy as np
import torch
from cells import prepare, run_cell, search
from sets import NAMES, PeopleSet, load_set
from states import Texts, read_texts
from summary import pictures, print_tables, summarise

from prefmix.experiments.comparison_files import provenance
from prefmix.experiments.demo import fast_dtype
from prefmix.experts.base_model import load_base

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fills in the cells that the work folder lacks, then writes figures and pictures from all of them."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"settings": _settings(args), "sets": {}}
    for name in args.sets:
        people = load_set(name, max_users=args.max_users)
        texts = read_or_keep(people, args, args.dim)
        chosen = _search(people, texts, args)
        cells = {
            kind: [_cell(people, texts, chosen, seed, kind, args) for seed in args.seeds]
            for kind in ("true", "shuffled")
        }
        report["sets"][name] = {"search": chosen} | summarise(cells)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_tables(report)
    pictures(report, args.output.parent)
    return report


def read_or_keep(people: PeopleSet, args: argparse.Namespace, dim: int) -> Texts:
    """Features of a set's texts, kept: the language model is loaded only where they are not there yet."""
    path = args.work_dir / f"texts-{people.name}-{dim}.pt"
    if not path.exists():
        base = load_base(args.model, dtype=fast_dtype() if args.dtype == "auto" else getattr(torch, args.dtype))
        args.work_dir.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(read_texts(people.catalogue(), base, args.work_dir, dim)), path)
    return Texts(*torch.load(path))


def _search(people: PeopleSet, texts: Texts, args: argparse.Namespace) -> dict[str, Any]:
    """The configuration of every method: the least mean over seeds on validation rows, which no seed scores."""
    path = args.work_dir / f"search-{people.name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for method in linear.METHODS:
        entry = found.setdefault(method, {"grid": linear.GRIDS[method], "by_seed": {}})
        for seed in args.seeds:
            if str(seed) not in entry["by_seed"]:
                prepared, single = prepare(people, seed, texts), None
                if method != "single":
                    single = linear.fit("single", found["single"]["chosen"], prepared.train, seed)
                    assert isinstance(single, linear.Types)
                entry["by_seed"][str(seed)] = search(method, prepared, single, seed)
                path.write_text(json.dumps(found, indent=1))
        losses = np.mean([entry["by_seed"][str(seed)] for seed in args.seeds], axis=0)
        entry |= {"validation_log_loss": losses.tolist(), "chosen": entry["grid"][int(losses.argmin())]}
        path.write_text(json.dumps(found, indent=1))
        print(f"{people.name}, {method}: {entry['chosen']}", flush=True)
    return found


def _cell(
    people: PeopleSet, texts: Texts, chosen: dict[str, Any], seed: int, kind: str, args: argparse.Namespace
) -> dict[str, Any]:
    path = args.work_dir / f"cell-{people.name}-{kind}-{seed}.pt"
    if not path.exists():
        configs = {method: found["chosen"] for method, found in chosen.items()}
        torch.save(run_cell(people, seed, texts, configs, shuffled=kind == "shuffled"), path)
        print(f"{people.name}, {kind} ids, seed {seed}: done", flush=True)
    # Our own file: numpy arrays beside numbers.
    return torch.load(path, weights_only=False)  # type: ignore[no-any-return]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    settings = {name: value for name, value in vars(args).items() if name not in ("work_dir", "output")}
    return settings | {"model": Path(args.model).name} | provenance()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Real people: types, blends, and shuffled ids.")
    parser.add_argument("--sets", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="smollm2", help="language model that reads the texts")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--dim", type=int, default=32, help="principal directions of the texts' mean states")
    parser.add_argument("--max-users", type=int, default=600, help="people of a set, drawn once")
    parser.add_argument("--work-dir", type=Path, default=Path("people"), help="states, searches and cells")
    parser.add_argument("--output", type=Path, default=RESULTS / "people.json")
    return parser


if __name__ == "__main__":
    main()
