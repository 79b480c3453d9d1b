"""What limits the gain: how much of a text is seen, and how much is known of a person.

    python recipes/people/limits.py --model smollm2

Single DPO and a reward for each person (cheap, and good everywhere), on the cut of seed 0: over the number of principal
directions that stand for a text, and over the number of training comparisons kept of each person. Their strengths are
chosen on validation rows each time; test rows are scored.
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
import torch
from cells import Prepared, prepare, row_loss
from run import RESULTS, read_or_keep
from sets import NAMES, load_set
from torch import Tensor

from prefmix.experiments.comparison_files import provenance
from prefmix.mixture.linear_em import ProbeData

DIMS = (4, 8, 16, 32, 64)
KEPT = (2, 4, 8, 16, 1000)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Both sweeps on every set; writes JSON and prints lines."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"settings": provenance()}
    for name in args.sets:
        people = load_set(name, max_users=args.max_users)
        found: dict[str, Any] = {"directions": {}, "comparisons": {}}
        for dim in DIMS:
            prepared = prepare(people, 0, read_or_keep(people, args, dim))
            found["directions"][str(dim)] = gain(prepared)
            if dim == args.dim:
                for kept in KEPT:
                    found["comparisons"][str(kept)] = gain(prepared, kept)
        report[name] = found
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(found), flush=True)
    return report


def gain(prepared: Prepared, kept: int = 1000) -> dict[str, float]:
    """Test log-loss of both when a person's own reward is fitted to the first `kept` of their training comparisons.

    Everybody's reward is fitted to all of them, so only what is known of a person changes.
    """
    singles = [linear.fit("single", config, prepared.train, 0) for config in linear.GRIDS["single"]]
    single = _best(singles, prepared.validation)
    assert isinstance(single, linear.Types)
    few = prepared.train.select(rank_in_group(prepared.train) < kept)
    own = _best([linear.fit("own", config, few, 0, single) for config in linear.GRIDS["own"]], prepared.validation)
    losses = [float(row_loss(model, prepared.test).mean()) for model in (single, own)]
    return {"single": losses[0], "own": losses[1], "gain": losses[0] - losses[1]}


def rank_in_group(data: ProbeData) -> Tensor:
    """[B] 0 for the first row of a person, 1 for the second, ..."""
    count = torch.bincount(data.group, minlength=data.num_groups)
    order = torch.argsort(data.group, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - (count.cumsum(0) - count).repeat_interleave(count)
    return rank


def _best(models: Sequence[linear.Model], validation: ProbeData) -> linear.Model:
    return min(models, key=lambda model: float(row_loss(model, validation).mean()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What limits the gain from knowing people.")
    parser.add_argument("--sets", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--dim", type=int, default=32, help="directions at which comparisons are varied")
    parser.add_argument("--max-users", type=int, default=600)
    parser.add_argument("--work-dir", type=Path, default=Path("people"))
    parser.add_argument("--output", type=Path, default=RESULTS / "limits.json")
    return parser


if __name__ == "__main__":
    main()
