"""Speed and memory of the core: the E-step of a million comparisons under eight experts, on one core.

    python benchmarks/em_speed.py                       three sizes of users, table and JSON
    python benchmarks/em_speed.py --rows 20000 --repeats 1

An E-step here is what training does before it saves: every user's evidence from the table of last log-likelihoods, and
Bayes' rule. First the answers are checked (float64 sums and logarithms in numpy), then CPU seconds are taken
and the bytes of live tensors counted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from measuring.machine import describe_machine
from torch import Tensor

from prefmix.mixture.posterior import Posterior, posterior
from prefmix.mixture.user_evidence import UserEvidence

RESULTS = Path(__file__).parent / "results" / "em_speed.json"
# Float32 sums of up to hundreds of nats.
TOLERANCE = 1e-4


class Speed(NamedTuple):
    """One size of users.

    Attributes:
        rows_per_user: comparisons of each user.
        cpu_seconds: median of the repeats, one core.
        table_bytes: of the persistent table, a row.
        kept_bytes: of everything that is kept (table, groups, weights, order of rows), a row.
        peak_bytes: the most that tensors held during an E-step, all of that included, a row.
        error: largest difference of q from float64, checked before timing.
    """

    rows_per_user: int
    cpu_seconds: float
    table_bytes: float
    kept_bytes: float
    peak_bytes: float
    error: float


def e_step(evidence: UserEvidence, log_weights: Tensor) -> Posterior:
    """Posterior of every user: log q [G, K] and log evidence [G]."""
    return posterior(log_weights.expand(evidence.num_groups, -1), evidence.group_evidence())


def filled_table(rows: int, experts: int, rows_per_user: int, generator: torch.Generator) -> UserEvidence:
    """A table whose rows have all been seen, users in random order."""
    users = max(1, rows // rows_per_user)
    group = torch.randint(0, users, (rows,), generator=generator)
    table = UserEvidence(rows, experts, group, torch.ones(rows), users, per_pair=False)
    table.table.uniform_(-1.0, 0.0, generator=generator)
    table.visited.fill_(True)
    return table


def gate(evidence: UserEvidence, log_weights: Tensor, group: np.ndarray) -> float:
    """Largest difference of q from the same in numpy's float64.

    Raises:
        AssertionError: it is above TOLERANCE, or rows of q do not sum to 1.
    """
    found = e_step(evidence, log_weights).log_resp.exp()
    columns = [np.bincount(group, column, evidence.num_groups) for column in evidence.table.numpy().T]
    joint = np.stack(columns, axis=1) + log_weights.double().numpy()
    joint -= joint.max(axis=1, keepdims=True)
    right = np.exp(joint) / np.exp(joint).sum(axis=1, keepdims=True)
    error = float(np.abs(found.numpy() - right).max())
    assert error < TOLERANCE, f"q is wrong by {error}: nothing is timed"
    assert float((found.sum(dim=1) - 1.0).abs().max()) < TOLERANCE
    return error


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` held at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max(initial=0))


def measure(rows: int, experts: int, rows_per_user: int, repeats: int) -> Speed:
    """Checks, then times and weighs one size."""
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.log_softmax(torch.randn(experts, generator=generator), dim=0)
    evidence = filled_table(rows, experts, rows_per_user, generator)
    kept = [evidence.table, evidence.visited, evidence._group, evidence._weight, evidence._rows]
    kept_bytes = sum(part.nbytes for part in kept)
    error = gate(evidence, log_weights, evidence._group.numpy())
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        e_step(evidence, log_weights)
        seconds.append(time.process_time() - start)
    peak = kept_bytes + peak_of(lambda: e_step(evidence, log_weights))
    return Speed(
        rows_per_user, float(np.median(seconds)), evidence.table.nbytes / rows, kept_bytes / rows, peak / rows, error
    )


def report(rows: int, experts: int, speeds: list[Speed]) -> None:
    """Prints the table."""
    table = 4 * experts
    print(f"{rows:,} comparisons, {experts} experts; a row of the table takes 4K = {table} bytes\n")
    print(
        "| comparisons a user | CPU seconds | table, bytes a row | all kept | peak | peak / 4K | largest error of q |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for s in speeds:
        print(
            f"| {s.rows_per_user} | {s.cpu_seconds:.3f} | {s.table_bytes:.0f} | {s.kept_bytes:.0f} | "
            f"{s.peak_bytes:.0f} | {s.peak_bytes / table:.2f} | {s.error:.0e} |"
        )


def main() -> None:
    """Parses, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rows-per-user", type=int, nargs="+", default=[2, 16, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    speeds = [measure(args.rows, args.experts, size, args.repeats) for size in args.rows_per_user]
    report(args.rows, args.experts, speeds)
    found: dict[str, Any] = {"machine": describe_machine(), "rows": args.rows, "experts": args.experts}
    found["speeds"] = [speed._asdict() for speed in speeds]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
