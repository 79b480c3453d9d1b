"""What K experts cost: CPU seconds and peak memory of one step at several K, against K = 1.

    python benchmarks/kernel.py --model smollm2 --output kernel.json

A step is the trunk's forward over the distinct texts of four pairs (92 prompt tokens, 93 and 94 completion tokens),
then forward and backward of K low-rank heads in hidden space; the optimizer is left out. A correctness gate against
float64 comes first. Contenders take turns in one process and one thread; CPU seconds are compared, because wall time on
a shared machine says little. Memory is the peak of a fresh process for each K (safetensors weights are
mapped, so loading does not hide the step's own peak). Texts are real reviews where PREFMIX_DATA names the folder of
data sets, otherwise random tokens.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import datetime
import gzip
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from prefmix.experts.base_model import BaseModel, load_base
from prefmix.experts.interface import PaddedTexts
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.kernels.low_rank_head import head_log_probs
from prefmix.kernels.tiles import Tiles

PROMPT, COMPLETIONS, PAIRS = 92, (93, 94), 4
LIMIT = 1.35


class StepSeconds(NamedTuple):
    """CPU seconds of one step: trunk forward, heads forward, heads backward."""

    trunk: float
    forward: float
    backward: float


def correctness() -> dict[str, dict[str, float]]:
    """Largest relative norm error against float64 on ragged texts, per type: forward and each gradient."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 17, 3, 40, 2])
    segments = torch.repeat_interleave(torch.arange(5), lengths)
    shapes = {"hidden": (63, 32), "base": (333, 32), "down": (8, 4, 32), "up": (8, 333, 4), "grad": (5, 8)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["base"] *= 0.3
    targets = torch.randint(333, (63,), generator=generator)
    errors = {}
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        cast = {name: x.to(dtype) if name in ("hidden", "base") else x for name, x in drawn.items()}
        found = _values(cast, targets, segments, "chunked")
        expected = _values({name: x.double() for name, x in cast.items()}, targets, segments, "eager")
        error = {name: float((found[name] - x).norm() / x.norm()) for name, x in expected.items()}
        if max(error.values()) > limit:
            raise SystemExit(f"correctness gate: {dtype} errors {error} exceed {limit}")
        errors[str(dtype).removeprefix("torch.")] = error
    return errors


def _values(tensors: dict[str, Tensor], targets: Tensor, segments: Tensor, impl: Any) -> dict[str, Tensor]:
    names = ("hidden", "down", "up")
    leaves = {name: tensors[name].clone().requires_grad_() for name in names}
    hidden, down, up = leaves.values()
    result = head_log_probs(
        hidden, targets, segments, 5, tensors["base"], down, up, impl=impl, tiles=Tiles(tokens=20, vocab=100)
    )
    grads = torch.autograd.grad((result.log_probs * tensors["grad"]).sum(), [hidden, down, up])
    values = {"log_probs": result.log_probs, "base_log_probs": result.base_log_probs, **dict(zip(names, grads))}
    return {name: value.detach().double() for name, value in values.items()}


def real_texts(base: BaseModel) -> tuple[PaddedTexts, str]:
    """Eight distinct texts of fixed lengths, and what they are."""
    need = PAIRS * 2
    longest = PROMPT + max(COMPLETIONS)
    folder = os.environ.get("PREFMIX_DATA")
    if folder and base.tokenizer is not None:
        with gzip.open(Path(folder) / "reviews" / "movies_train.jsonl.gz", "rt", encoding="utf-8") as lines:
            ids = (base.tokenizer(json.loads(line)["text"])["input_ids"] for line in lines)
            rows, kind = [next(row[:longest] for row in ids if len(row) >= longest) for _ in range(need)], "reviews"
    else:
        vocab = base.model.config.vocab_size
        rows, kind = np.random.default_rng(0).integers(3, vocab, (need, longest)).tolist(), "random tokens"
    lengths = torch.tensor([PROMPT + COMPLETIONS[i % 2] for i in range(need)])[:, None]
    position = torch.arange(longest)[None]
    attention = (position < lengths).long()
    return PaddedTexts(torch.tensor(rows) * attention, attention, attention * (position >= PROMPT)), kind


def make_experts(base: BaseModel, num_experts: int, rank: int) -> SharedBaseExperts:
    """Heads in hidden space that have left their zero start, so that nothing is trivially zero."""
    experts = SharedBaseExperts(base.model, num_experts, head="hidden", rank=rank)
    torch.nn.init.normal_(experts.head.get_parameter("up"), std=0.01)
    return experts


def step(experts: SharedBaseExperts, texts: PaddedTexts) -> StepSeconds:
    """One step; gradients are dropped as an optimizer would."""
    experts.zero_grad(set_to_none=True)
    t0 = time.process_time()
    states = experts.trunk_states(texts)
    t1 = time.process_time()
    log_probs = experts(states).log_probs
    t2 = time.process_time()
    sign = torch.tensor([1.0, -1.0]).repeat(PAIRS)[:, None]
    (log_probs * sign).sum().backward()
    return StepSeconds(t1 - t0, t2 - t1, time.process_time() - t2)


def time_steps(base: BaseModel, ks: list[int], rank: int, repeats: int) -> dict[int, list[StepSeconds]]:
    """Steps at every K, taking turns; the first round warms up and is not counted."""
    texts, _ = real_texts(base)
    contenders = {k: make_experts(base, k, rank) for k in ks}
    seconds: dict[int, list[StepSeconds]] = {k: [] for k in ks}
    for repeat in range(repeats + 1):
        for k in ks if repeat % 2 else reversed(ks):
            measured = step(contenders[k], texts)
            if repeat:
                seconds[k].append(measured)
        print(f"round {repeat} of {repeats}", file=sys.stderr, flush=True)
    return seconds


def ratio_interval(values: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Median over rounds of the ratio to K = 1, and its 95% bootstrap interval."""
    ratios = values / reference
    draws = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def peak_megabytes(model: str, num_experts: int, rank: int, repeats: int = 3) -> float:
    """Median over fresh processes of their peak memory after two steps.

    Call it while this process is still small: on Linux a child's `ru_maxrss` starts from its parent's memory.
    """
    command = [sys.executable, __file__, "--model", model, "--rank", str(rank), "--memory_cell", str(num_experts)]
    peaks = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]))
    return float(np.median(peaks))


def memory_cell(model: str, num_experts: int, rank: int) -> None:
    """Prints this process's peak memory in MB after two steps."""
    base = load_base(model, dtype=torch.float32)
    texts, _ = real_texts(base)
    experts = make_experts(base, num_experts, rank)
    for _ in range(2):
        step(experts, texts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / (1e6 if sys.platform == "darwin" else 1e3))


def machine() -> dict[str, Any]:
    """Where and with what this ran, and the speed limit: a single-thread float32 matrix product."""
    a, b, best = torch.randn(1024, 1024), torch.randn(1024, 1024), 0.0
    for _ in range(5):
        start = time.process_time()
        torch.mm(a, b)
        best = max(best, 2 * 1024**3 / 1e9 / (time.process_time() - start))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), "")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": cpu or platform.processor(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "matrix_product_gflops": round(best, 1),
    }


def _cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


def operations(base: BaseModel, num_experts: int, rank: int) -> dict[str, float]:
    """Analytic multiply-adds times two of one step, in GFLOP: trunk weights, base products, low-rank products."""
    vocab, width = base.model.get_output_embeddings().weight.shape
    trunk_weights = sum(p.numel() for p in base.model.get_decoder().parameters() if p.dim() == 2) - vocab * width
    tokens, completion = PAIRS * sum(PROMPT + c for c in COMPLETIONS), PAIRS * sum(COMPLETIONS)
    return {
        "trunk": 2e-9 * tokens * trunk_weights,
        "base_products": 2 * 2e-9 * completion * vocab * width,
        "low_rank": 2e-9 * num_experts * vocab * rank * (4 * completion + 2 * width),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["   K   trunk s   heads fwd   heads bwd   step s   ratio to K=1 (95%)      peak MB   ratio"]
    for k, cell in report["cells"].items():
        ratio, low, high = cell["ratio"]
        lines.append(
            f"{k:>4} {cell['trunk']:>9.2f} {cell['forward']:>11.2f} {cell['backward']:>11.2f} {cell['step']:>8.2f}"
            f"   {ratio:.3f} ({low:.3f}-{high:.3f}) {cell['peak_mb']:>13.0f} {cell['peak_ratio']:>7.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Gate, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="what load_base takes")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of experts, 1 among them")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7, help="counted rounds")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--memory_cell", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_cell:
        return memory_cell(args.model, args.memory_cell, args.rank)
    ks = sorted({1, *args.experts})
    report: dict[str, Any] = {"machine": machine(), "correctness": correctness(), "rank": args.rank, "cells": {}}
    peaks = {k: peak_megabytes(args.model, k, args.rank) for k in ks}
    base = load_base(args.model, dtype=torch.float32)
    report |= {"model": base.source, "base_sha256": base.sha256, "texts": real_texts(base)[1]}
    seconds = time_steps(base, ks, args.rank, args.repeats)
    totals = {k: np.array([sum(s) for s in steps]) for k, steps in seconds.items()}
    for k, steps in seconds.items():
        report["cells"][k] = {
            **{name: float(np.median([getattr(s, name) for s in steps])) for name in StepSeconds._fields},
            "step": float(np.median(totals[k])),
            "ratio": ratio_interval(totals[k], totals[1]),
            "peak_mb": peaks[k],
            "peak_ratio": peaks[k] / peaks[1],
            "gflop": operations(base, k, args.rank),
        }
    print(f"{report['machine']}\n{report['correctness']}\n{report['model']}, texts: {report['texts']}\n{table(report)}")
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    worst = report["cells"].get(8)
    if worst is not None:
        met = max(worst["ratio"][0], worst["peak_ratio"]) <= LIMIT
        print(f"K=8 against K=1 at most {LIMIT} in CPU seconds and in peak memory: {'met' if met else 'NOT met'}")
        sys.exit(0 if met else 1)
    return None


if __name__ == "__main__":
    main()
