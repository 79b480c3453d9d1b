"""Does the search over K find how many groups were planted? Linear tastes, 300 users, 16 comparisons each.

    python recipes/choose_k/run.py --output recipes/choose_k/results/linear.json

README.md beside this file says what to expect.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefmix.data.simulated_texts import feature_pools
from prefmix.data.simulation import simulate
from prefmix.data.simulation_options import Layout, SimulationOptions
from prefmix.experiments.choose_k import choose_k
from prefmix.mixture.linear_em import ProbeData

NUM_FEATURES = 8


class Setting(NamedTuple):
    """One planted truth.

    Attributes:
        num_groups: K_true.
        layout: of the tastes.
        num_seeds: data sets.
        bar: seeds of them in which K_true must be found; None: reported only.
    """

    num_groups: int
    layout: Layout
    num_seeds: int
    bar: int | None


SETTINGS = {
    **{f"{k} orthogonal": Setting(k, "orthogonal", 20, 18) for k in (1, 2, 3, 4)},
    **{f"{k} orthogonal": Setting(k, "orthogonal", 10, None) for k in (5, 6)},
    "2 at cosine 0.5": Setting(2, "shared", 10, None),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the settings, prints a line each, writes JSON after every one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where results go as JSON")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--num_seeds", type=int, help="fewer seeds, to try it")
    parser.add_argument("--num_users", type=int, default=300)
    parser.add_argument("--comparisons_per_user", type=int, default=16)
    args = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "num_users": args.num_users,
        "comparisons_per_user": args.comparisons_per_user,
        "num_features": NUM_FEATURES,
        "settings": {},
    }
    for name in args.settings:
        setting = SETTINGS[name]
        start = time.process_time()
        seeds = range(min(setting.num_seeds, args.num_seeds or setting.num_seeds))
        runs = [_run(setting, seed, args.num_users, args.comparisons_per_user) for seed in seeds]
        found = sum(run["num_experts"] == setting.num_groups for run in runs)
        report["settings"][name] = {
            **setting._asdict(),
            "found": found,
            "of": len(runs),
            "chosen": _count(run["num_experts"] for run in runs),
            **{rule: _count(run[rule] for run in runs) for rule in ("best", "by_bic", "by_icl", "by_pruning")},
            "cpu_seconds_a_search": (time.process_time() - start) / len(runs),
            "runs": runs,
        }
        print(f"{name}: found in {found} of {len(runs)}; chosen {report['settings'][name]['chosen']}", flush=True)
        if args.output:
            Path(args.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _run(setting: Setting, seed: int, num_users: int, comparisons_per_user: int) -> dict[str, Any]:
    options = SimulationOptions(
        num_groups=setting.num_groups,
        layout=setting.layout,
        cosine=0.5,
        num_users=num_users,
        comparisons_per_user=comparisons_per_user,
        test_per_user=1,
    )
    judged = simulate(feature_pools(NUM_FEATURES, seed=seed), options, seed).judged["train"]
    # Only what a person would see: who chose which text's features. Tastes and groups stay behind.
    difference = torch.from_numpy(judged.difference * judged.answer[:, None]).float()
    data = ProbeData(difference, torch.from_numpy(judged.user), torch.ones(len(difference)), num_users)
    choice = choose_k(data, range(1, 9), seed=seed)
    return {
        "seed": seed,
        **{key: value for key, value in choice._asdict().items() if key != "candidates"},
        "held_out": [round(candidate.held_out, 4) for candidate in choice.candidates],
    }


def _count(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


if __name__ == "__main__":
    main()
