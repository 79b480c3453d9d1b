"""What K low-rank heads cost by each implementation: CPU seconds, share of the processor's peak, and peak memory.

    python benchmarks/kernel.py --model smollm2 --output kernel.json

A step is the trunk's forward over the distinct texts of four pairs (92 prompt tokens, 93 and 94 completion tokens) and
everything of K heads in hidden space: B = W U, forward, backward down to U and V. The optimizer is left out. A
correctness gate against float64 comes first. All contenders take turns in one process and one thread; CPU seconds are
compared, because wall time on a shared machine says little. Memory is the peak of a fresh process for each cell
(safetensors weights are mapped, so loading does not hide the step's own peak). Texts are real reviews where
PREFMIX_DATA names the folder of data sets, otherwise random tokens.

| contender    | what it is                                                                    |
| ------------ | ----------------------------------------------------------------------------- |
| `recomputed` | pure torch, base logits computed a second time in the backward                |
| `chunked`    | pure torch, base logits kept for the backward                                 |
| `compiled`   | C, base logits kept                                                           |
| `streamed`   | C, gradients pair by pair, no more base logits held than those of some pairs  |
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import gzip
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring.intervals import Interval, median_interval, ratio_interval
from measuring.machine import describe_machine, matrix_product_peak
from measuring.products import Products, head_products
from measuring.texts import StepTokens
from torch import Tensor

from prefmix.experts.base_model import BaseModel, load_base
from prefmix.experts.interface import PackedStates, PaddedTexts
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.kernels.low_rank_compiled import why_not
from prefmix.kernels.low_rank_head import head_log_probs
from prefmix.kernels.streamed_head import head_log_probs_and_grads
from prefmix.kernels.texts import HeadLogProbs
from prefmix.kernels.tiles import Tiles
from prefmix.kernels.up_projection import project_up

PROMPT, COMPLETIONS, PAIRS = 92, (93, 94), 4
TEXTS = 2 * PAIRS
CONTENDERS = ("recomputed", "chunked", "compiled", "streamed")
# Shares of the step with one head that a further head may cost; how much more memory sixteen heads may take.
HEAD_BARS = {"compiled": 0.025, "chunked": 0.05}
MEMORY_BAR, PEAK_BAR, COMPILED_BAR = 1.35, 0.7, 1.3


class Problem(NamedTuple):
    """Inputs of one head step; see `head_log_probs`. `up` is U [K, D, r], `grad` the gradient of the texts [N, K]."""

    states: PackedStates
    weight: Tensor
    down: Tensor
    up: Tensor
    grad: Tensor


def run_heads(problem: Problem, contender: str, tiles: Tiles | None = None) -> HeadLogProbs:
    """Forward and backward of one contender; leaves gradients in `down.grad` and `up.grad`."""
    states, weight, down, up, grad = problem
    down.grad = up.grad = None
    logit_up = project_up(weight, up)
    if contender == "streamed":
        pairs = torch.arange(states.num_texts) // 2
        found = head_log_probs_and_grads(
            *states, weight, down, logit_up, lambda texts, _: grad[texts], components=pairs, tiles=tiles
        )
        down.grad = found.grad_down
        logit_up.backward(found.grad_up)
        return HeadLogProbs(found.log_probs, found.base_log_probs)
    if contender == "recomputed":
        tiles = (tiles or Tiles(1024, 1024))._replace(kept_bytes=0)
    impl: Any = {"recomputed": "chunked"}.get(contender, contender)
    result = head_log_probs(*states, weight, down, logit_up, impl=impl, tiles=tiles)
    result.log_probs.backward(grad)
    return result


def correctness(contenders: list[str]) -> dict[str, dict[str, float]]:
    """Largest relative norm error against float64 on ragged texts, per contender and type.

    Raises:
        SystemExit: an error exceeds its limit.
    """
    generator = torch.Generator().manual_seed(0)
    segments = torch.repeat_interleave(torch.arange(6), torch.tensor([1, 17, 3, 40, 2, 9]))
    shapes = {"hidden": (72, 32), "weight": (333, 32), "down": (8, 4, 32), "up": (8, 32, 4), "grad": (6, 8)}
    drawn = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    targets = torch.randint(333, (72,), generator=generator)
    errors: dict[str, dict[str, float]] = {}
    for contender in contenders:
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            cast = {name: x.to(dtype) if name in ("hidden", "weight") else x for name, x in drawn.items()}
            found = _values(cast, targets, segments, contender)
            expected = _values({name: x.double() for name, x in cast.items()}, targets, segments, "eager")
            error = {name: float((found[name] - x).norm() / x.norm()) for name, x in expected.items()}
            if not max(error.values()) <= limit:
                raise SystemExit(f"correctness gate: {contender}, {dtype}: errors {error} exceed {limit}")
            errors[f"{contender}, {str(dtype).removeprefix('torch.')}"] = error
    return errors


def _values(tensors: dict[str, Tensor], targets: Tensor, segments: Tensor, contender: str) -> dict[str, Tensor]:
    down, up = (tensors[name].clone().requires_grad_() for name in ("down", "up"))
    states = PackedStates(tensors["hidden"], targets, segments, 6)
    result = run_heads(Problem(states, tensors["weight"], down, up, tensors["grad"]), contender, Tiles(20, 100))
    assert down.grad is not None and up.grad is not None
    values = {"log_probs": result.log_probs, "base": result.base_log_probs, "down": down.grad, "up": up.grad}
    return {name: value.detach().double() for name, value in values.items()}


def real_texts(base: BaseModel) -> tuple[PaddedTexts, str]:
    """Eight distinct texts of fixed lengths, and what they are."""
    longest = PROMPT + max(COMPLETIONS)
    folder = os.environ.get("PREFMIX_DATA")
    if folder and base.tokenizer is not None:
        with gzip.open(Path(folder) / "reviews" / "movies_train.jsonl.gz", "rt", encoding="utf-8") as lines:
            ids = (base.tokenizer(json.loads(line)["text"])["input_ids"] for line in lines)
            rows, kind = [next(row[:longest] for row in ids if len(row) >= longest) for _ in range(TEXTS)], "reviews"
    else:
        vocab = base.model.config.vocab_size
        rows, kind = np.random.default_rng(0).integers(3, vocab, (TEXTS, longest)).tolist(), "random tokens"
    lengths = torch.tensor([PROMPT + COMPLETIONS[i % 2] for i in range(TEXTS)])[:, None]
    position = torch.arange(longest)[None]
    attention = (position < lengths).long()
    return PaddedTexts(torch.tensor(rows) * attention, attention, attention * (position >= PROMPT)), kind


def step_tokens() -> StepTokens:
    """What `real_texts` holds."""
    lengths = [PROMPT + COMPLETIONS[i % 2] for i in range(TEXTS)]
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    completion, padded = PAIRS * sum(COMPLETIONS), TEXTS * max(lengths)
    return StepTokens(TEXTS, sum(lengths), padded, completion, pairs, sum(lengths), pairs)


def make_problem(base: BaseModel, states: PackedStates, num_experts: int, rank: int) -> Problem:
    """Heads that have left their zero start, so that nothing is trivially zero, and a gradient for every pair."""
    head = SharedBaseExperts(base.model, num_experts, head="hidden", rank=rank).head
    down, up = head.get_parameter("down"), head.get_parameter("up")
    torch.nn.init.normal_(up, std=0.01)
    grad = torch.tensor([-0.05, 0.05]).repeat(PAIRS)[:, None].expand(-1, num_experts).contiguous()
    return Problem(states, base.model.get_output_embeddings().weight.detach(), down, up, grad)


class Measured(NamedTuple):
    """CPU seconds of every round: of the trunk, and of the heads by contender and K."""

    trunk: list[float]
    heads: dict[tuple[str, int], list[float]]


def time_rounds(base: BaseModel, contenders: list[str], ks: list[int], rank: int, repeats: int) -> Measured:
    """Everybody takes turns, in an order that turns round; the first round warms up and is not counted."""
    texts, _ = real_texts(base)
    experts = SharedBaseExperts(base.model, 1, head="hidden", rank=rank)
    states = experts.trunk_states(texts)
    problems = {k: make_problem(base, states, k, rank) for k in ks}
    cells = [(contender, k) for k in ks for contender in contenders]
    measured = Measured([], {cell: [] for cell in cells})
    for repeat in range(repeats + 1):
        start = time.process_time()
        experts.trunk_states(texts)
        trunk = time.process_time() - start
        for contender, k in cells if repeat % 2 else reversed(cells):
            start = time.process_time()
            run_heads(problems[k], contender)
            if repeat:
                measured.heads[contender, k].append(time.process_time() - start)
        if repeat:
            measured.trunk.append(trunk)
        print(f"round {repeat} of {repeats}", file=sys.stderr, flush=True)
    return measured


def peak_megabytes(args: argparse.Namespace, contender: str, num_experts: int) -> float:
    """Peak memory of a fresh process after two steps.

    Call it while this process is still small: on Linux a child's `ru_maxrss` starts from its parent's memory.
    """
    cell = ["--memory_cell", contender, str(num_experts)]
    command = [sys.executable, __file__, "--model", args.model, "--rank", str(args.rank), "--dtype", args.dtype, *cell]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory_cell(args: argparse.Namespace) -> None:
    """Prints this process's peak memory in MB after two steps."""
    contender, num_experts = args.memory_cell[0], int(args.memory_cell[1])
    base = load_base(args.model, dtype=getattr(torch, args.dtype))
    texts, _ = real_texts(base)
    experts = SharedBaseExperts(base.model, 1, head="hidden", rank=args.rank)
    for _ in range(2):
        states = experts.trunk_states(texts)
        run_heads(make_problem(base, states, num_experts, args.rank), contender)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / (1e6 if sys.platform == "darwin" else 1e3))


class Cell(NamedTuple):
    """What one contender costs at one K.

    Attributes:
        heads: CPU seconds without the trunk.
        against_pure: `chunked` over this contender, by round.
        further_head: what one head more costs, in shares of the contender's step at K = 1; None there.
        peak_share: needed products at the processor's peak over the time: later epochs, the trunk's states cached.
        peak_share_trunk: the same with the trunk: first epoch.
        memory_mb: None where it was not measured.
    """

    heads: Interval
    against_pure: Interval
    further_head: Interval | None
    peak_share: float
    peak_share_trunk: float
    memory_mb: float | None


def cell_of(
    measured: Measured, contender: str, k: int, needs: tuple[Products, Products], peaks: tuple[float, float],
    memory: float | None,
) -> Cell:  # fmt: skip
    """Medians and intervals; `needs` with and without the trunk, `peaks` of the base's type and of float32."""
    heads, one = measured.heads[contender, k], measured.heads[contender, 1]
    pure = measured.heads.get(("chunked", k), heads)
    further = [(a - b) / (k - 1) / (b + t) for a, b, t in zip(heads, one, measured.trunk)] if k > 1 else None
    with_trunk, cached = (need.least_seconds(*peaks) for need in needs)
    found, trunk = median_interval(heads), float(np.median(measured.trunk))
    return Cell(
        found,
        ratio_interval(pure, heads),
        None if further is None else median_interval(further),
        cached / found.median,
        with_trunk / (found.median + trunk),
        memory,
    )


def table(cells: dict[tuple[str, int], Cell]) -> str:
    """The report for people."""
    lines = [
        "contender     K   heads s (95%)           chunked/this       further head %     peak %  +trunk %   peak MB"
    ]
    for (contender, k), cell in cells.items():
        further = "" if cell.further_head is None else _percent(cell.further_head)
        memory = "" if cell.memory_mb is None else f"{cell.memory_mb:.0f}"
        lines.append(
            f"{contender:<12} {k:>2}   {cell.heads!s:<23} {cell.against_pure!s:<18} {further:<18}"
            f" {100 * cell.peak_share:>6.0f} {100 * cell.peak_share_trunk:>8.0f} {memory:>10}"
        )
    return "\n".join(lines)


def _percent(share: Interval) -> str:
    return str(Interval(*(100 * x for x in share)))


def verdicts(cells: dict[tuple[str, int], Cell]) -> dict[str, bool]:
    """The bars that this benchmark can check."""
    found: dict[str, bool] = {}
    for contender, bar in HEAD_BARS.items():
        for k in (8, 16):
            cell = cells.get((contender, k))
            if cell is not None and cell.further_head is not None:
                name = f"{contender}: a further head at K={k} costs at most {100 * bar:g}% of the step with one"
                found[name] = cell.further_head.median <= bar
    best = cells.get(("compiled", 8), cells.get(("chunked", 8)))
    if best is not None:
        found[f"K=8: at least {100 * PEAK_BAR:g}% of the peak, trunk cached"] = best.peak_share >= PEAK_BAR
        found[f"K=8: at least {100 * PEAK_BAR:g}% of the peak, trunk included"] = best.peak_share_trunk >= PEAK_BAR
    for contender in HEAD_BARS:
        many, one = (cell.memory_mb if (cell := cells.get((contender, k))) else None for k in (16, 1))
        if many and one:
            found[f"{contender}: memory of K=16 at most {MEMORY_BAR} times K=1"] = many / one <= MEMORY_BAR
    if ("compiled", 8) in cells:
        speed = cells["compiled", 8].against_pure.median
        found[f"compiled at least {COMPILED_BAR} times as fast as chunked at K=8"] = speed >= COMPILED_BAR
    return found


def main() -> None:
    """Gate, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="what load_base takes")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of experts")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the base")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds")
    parser.add_argument("--no_memory", action="store_true", help="leave the memory cells out")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--memory_cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_cell:
        return memory_cell(args)
    contenders = [name for name in args.contenders if name != "compiled" or why_not() is None]
    ks = sorted({1, *args.experts})
    gate = correctness(contenders)
    sparse = [(name, k) for name in contenders for k in ks if k in (1, 8, 16)]
    memory = {} if args.no_memory else {cell: peak_megabytes(args, *cell) for cell in sparse}
    base = load_base(args.model, dtype=getattr(torch, args.dtype))
    measured = time_rounds(base, contenders, ks, args.rank, args.repeats)
    peaks = matrix_product_peak(getattr(torch, args.dtype)), matrix_product_peak(torch.float32)
    cells = {}
    for contender, k in measured.heads:
        needs = [head_products(base.model, step_tokens(), k, args.rank, cached=cached) for cached in (False, True)]
        cells[contender, k] = cell_of(measured, contender, k, (needs[0], needs[1]), peaks, memory.get((contender, k)))
    trunk, bars = median_interval(measured.trunk), verdicts(cells)
    report = {
        "machine": describe_machine(),
        "model": base.source,
        "texts": real_texts(base)[1],
        "dtype": args.dtype,
        "rank": args.rank,
        "peaks": {"base_gflops": peaks[0], "float32_gflops": peaks[1]},
        "correctness": gate,
        "trunk": trunk,
        "rounds": {"trunk": measured.trunk} | {f"{name}, K={k}": s for (name, k), s in measured.heads.items()},
        "cells": {f"{name}, K={k}": cell._asdict() for (name, k), cell in cells.items()},
        "bars": bars,
    }
    print(f"{report['machine']}\n{base.source}, {args.dtype}, texts: {report['texts']}, rank {args.rank}")
    print(f"peak {peaks[0]:.0f} GFLOP/s ({args.dtype}), {peaks[1]:.0f} (float32); trunk {trunk} s\n{table(cells)}")
    for name, met in bars.items():
        print(f"{'met    ' if met else 'NOT met'}  {name}")
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
