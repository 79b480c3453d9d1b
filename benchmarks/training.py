"""Whole training steps against TRL's `DPOTrainer`: CPU seconds, memory, share of the machine's peak.

    python benchmarks/training.py                                   # 32 CPU minutes, 9 GB of memory
    python benchmarks/training.py --quick --only 1 3                # two repetitions, two of the figures
    python benchmarks/training.py --output benchmarks/results/training.json

A correctness gate comes first: loss and gradient of each of ours on a tiny model against float64 with all logits in
memory, and K = 1 against TRL's on the model that is timed. Then contenders take turns in one process and one thread, a
whole optimizer step at a time, each in its own unmodified training loop; CPU seconds are compared round by round. Peak
memory is `ru_maxrss` of a fresh process each. Texts are real and distinct (movie reviews where PREFMIX_DATA names the
folder of data sets, else arguments that the package ships), prompt and responses cut to fixed lengths.
Without TRL only the figures that need none are measured.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from measuring import figures as names
from measuring.contenders import OURS, RANK, TRL, Bases, Course, our_trainer, trl_trainer
from measuring.figures import Figure, Peaks, all_figures, products_of
from measuring.gate import check_against_trl, check_ours
from measuring.machine import describe_machine, matrix_product_peak
from measuring.prefixes import PrefixSharing, measure_prefix_sharing
from measuring.report import as_json, figure_table, memory_table, stage_table
from measuring.stages import CONVARG, Plan, StageResult, note, run_stage
from measuring.texts import AGAINST_BOTH, MIXES, distinct_rows
from measuring.turns import SteppedTrainer, give_memory_back, share_one_heap

from prefmix.experts.base_model import BaseModel, load_base

# figure -> stage -> contenders; `| variant`s are taken where this version of prefmix has them.
NEEDS: dict[int, dict[str, list[str]]] = {
    1: {
        "1:1": [
            *("TRL LoRA", "TRL LoRA, defaults", "TRL LoRA, fastest", names.PRECOMPUTED),
            *(names.LORA, f"{names.LORA}, bf16"),
        ],
        "4:1": ["TRL LoRA", "LoRA, all blocks, K=1"],
        "1:3": ["TRL LoRA", "LoRA, all blocks, K=1"],
    },
    2: {
        "1:1": ["TRL LoRA", "TRL LoRA, fastest", "TRL full head", "full head, K=1", "heads, K=8", "heads, K=8, bf16"],
        "4:1": ["TRL LoRA", "heads, K=8"],
        "1:3": ["TRL LoRA", "heads, K=8"],
    },
    3: {
        "1:1": ["TRL LoRA", "TRL LoRA, fastest", "heads, K=8, cached", "heads, K=8, cached, bf16"],
        "4:1": ["TRL LoRA", "heads, K=8, cached"],
        CONVARG: ["TRL LoRA", "heads, K=8, cached"],
    },
    4: {"1:1": ["heads, K=1", "heads, K=8", "heads, K=16"]},
    5: {"1:1": ["TRL LoRA", "last four blocks, K=8, all", "last four blocks, K=8, sampled"]},
    6: {"1:1": ["LoRA, all blocks, K=1"], "4:1": ["LoRA, all blocks, K=1"]},
    7: {"1:1": ["heads, K=8", "heads, K=8, cached"]},
}
STAGES = ("1:1", "4:1", CONVARG, "1:3")
IN_MEMORY = ("TRL LoRA", "LoRA, all blocks, K=1", "heads, K=1", "heads, K=8", "heads, K=16")


def plan_stages(only: Iterable[int], rows: Iterable[str], with_trl: bool) -> dict[str, list[str]]:
    """Stage -> contenders of the figures asked for, TRL's first."""
    wanted: dict[str, list[str]] = {}
    for number in only:
        for stage, contenders in NEEDS[number].items():
            if stage not in rows:
                continue
            present = [name for name in contenders if with_trl or name not in TRL]
            wanted.setdefault(stage, []).extend(present)
    order = [*TRL, *OURS]
    return {
        stage: [variant for name in order if name in wanted[stage] for variant in _with_variants(name)]
        for stage in STAGES
        if wanted.get(stage)
    }


def _with_variants(name: str) -> list[str]:
    """A contender and its implementations: prompts once and twice for LoRA, pure torch beside heads."""
    if name == names.LORA:
        return [name + names.KNOWN, name + names.ONCE, name + names.TWICE]
    pure = name in ("heads, K=1", names.HEADS, names.CACHED, "heads, K=16")
    return [name, name + names.PURE] if pure else [name]


def gate(plan: dict[str, list[str]], bases: Bases, with_trl: bool) -> dict[str, Any]:
    """Checks every contender that is timed; what is drawn at random (sampled) and 16 bits are left to the tests."""
    ours = [name for stage in plan.values() for name in stage if name not in TRL]
    exact = [name for name in dict.fromkeys(ours) if "sampled" not in name and "bf16" not in name]
    tokenizer = bases[torch.float32].tokenizer
    assert tokenizer is not None
    rows = distinct_rows("1:1", 2, tokenizer, seed=1).rows
    errors: dict[str, Any] = {
        "against float64": {k: e._asdict() for k, e in check_ours(exact, rows, tokenizer).items()}
    }
    if with_trl:
        errors["against TRL"] = {
            name: check_against_trl(name, bases, rows[:1])._asdict() for name in exact if name.startswith(names.LORA)
        }
    return errors


def peak_megabytes(name: str, args: argparse.Namespace) -> float:
    """Peak memory of a fresh process that takes two steps."""
    command = [sys.executable, __file__, "--model", args.model, "--pairs", str(args.pairs), "--memory", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"memory of {name}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def memory_cell(name: str, args: argparse.Namespace) -> None:
    """Prints this process's peak memory in MB after two steps."""
    bases = Bases(partial(_load, args.model))
    tokenizer = bases[torch.float32].tokenizer
    assert tokenizer is not None
    course = Course(distinct_rows("1:1", 2 * args.pairs, tokenizer).rows, args.pairs, 2, tempfile.gettempdir())
    # Nobody else needs the base here, so TRL's trainer does not get a copy of it.
    build = partial(trl_trainer, name, bases, course, own_base=True) if name in TRL else None
    stepped = SteppedTrainer(build or partial(our_trainer, name, bases, course))
    for _ in range(2):
        stepped.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / (1e6 if sys.platform == "darwin" else 1e3))
    stepped.close()


class Measured(NamedTuple):
    """Everything that a run has found so far.

    Attributes:
        machine: where it runs, and from which commit.
        settings: what was asked for.
        memory: peak megabytes of fresh processes.
        errors: what the correctness gate saw.
        peaks: matrix products, measured between rounds.
        stages: by their rows.
        prefixes: prompts read once against twice, the trunk alone.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    memory: dict[str, float]
    errors: dict[str, Any]
    peaks: list[Peaks]
    stages: dict[str, StageResult]
    prefixes: dict[str, PrefixSharing]

    @property
    def best(self) -> Peaks:
        """The best matrix products of the whole run."""
        return Peaks(*(max(values) for values in zip(*self.peaks)))

    def figures(self, base: BaseModel) -> list[Figure]:
        """All figures whose contenders were measured."""
        return all_figures(self.stages, self.prefixes, self.memory, self.best, base.model)

    def tables(self, base: BaseModel) -> str:
        """For people."""
        parts = [figure_table(self.figures(base)), *(stage_table(name, stage) for name, stage in self.stages.items())]
        parts += [memory_table(self.memory)] if self.memory else []
        against_trl = ", ".join(
            f"{name.replace(' | ', ', ')}: loss {error['loss']:.1e}, gradient {error['gradient']:.1e}"
            for name, error in self.errors.get("against TRL", {}).items()
        )
        parts.append(
            f"Matrix-product peak of the run, one thread: {self.best.float32:.0f} GFLOP/s in float32, "
            f"{self.best.bfloat16:.0f} in bfloat16. Relative difference from TRL: {against_trl or 'not compared'}."
        )
        return "\n\n".join(parts)

    def to_json(self, base: BaseModel) -> dict[str, Any]:
        """For machines."""
        operations = {
            stage: {
                name: products_of(name, result, timed, base.model)._asdict()
                for name, timed in result.timed.items()
                if name.startswith("heads")
            }
            for stage, result in self.stages.items()
        }
        prefixes = {mix: found._asdict() | {"ratio": found.ratio._asdict()} for mix, found in self.prefixes.items()}
        return {
            "machine": self.machine,
            "model": Path(base.source).name,
            "model_sha256": base.sha256,
            "settings": self.settings,
            "gate": self.errors,
            "matrix_product_gflops": self.best._asdict(),
            "matrix_product_gflops_by_round": [peak._asdict() for peak in self.peaks],
            "gflop_of_a_step": operations,
            "prefix_sharing": prefixes,
            **as_json(self.stages, self.figures(base), self.memory),
        }


def run(args: argparse.Namespace) -> str:
    """Memory, gate, stages; returns the tables. The JSON file grows with every stage; Ctrl-C keeps whole stages."""
    with_trl = importlib.util.find_spec("trl") is not None
    if not with_trl:
        note("TRL is not installed (pip install 'trl==1.16.0'): nothing is compared with it")
    # First, while this process is small: on Linux a child's ru_maxrss starts from its parent's memory.
    cells = [name for name in IN_MEMORY if with_trl or name not in TRL] if 4 in args.only else []
    memory = {name: peak_megabytes(name, args) for name in cells}
    bases = Bases(partial(_load, args.model))
    base = bases[torch.float32]
    plan = plan_stages(args.only, args.rows, with_trl)
    settings = {"pairs": args.pairs, "repetitions": args.repetitions, "rank": RANK, "tokens": MIXES | AGAINST_BOTH}
    measured = Measured(describe_machine(), settings, memory, gate(plan, bases, with_trl), [], {}, {})
    note(f"gate passed: {json.dumps(measured.errors)}")
    _measure_peaks(measured.peaks)
    few = (args.repetitions + 1) // 2
    try:
        for mix in ("1:1", *AGAINST_BOTH, "4:1") if 6 in args.only else ():
            if mix.partition(" ")[0] in args.rows:
                measured.prefixes[mix] = measure_prefix_sharing(base, mix, max(args.pairs // 2, 1), few, note)
        for stage, contenders in plan.items():
            repetitions = args.repetitions if stage in ("1:1", "4:1") else few
            after_round = partial(_measure_peaks, measured.peaks)
            measured.stages[stage] = run_stage(Plan(stage, contenders, args.pairs, repetitions, after_round), bases)
            give_memory_back()
            _write(measured, base, args.output)
    except KeyboardInterrupt:
        note(f"stopped; whole are {', '.join(measured.stages)}")
    _write(measured, base, args.output)
    return measured.tables(base)


def _measure_peaks(peaks: list[Peaks]) -> None:
    peaks.append(Peaks(matrix_product_peak(torch.float32), matrix_product_peak(torch.bfloat16)))


def _write(measured: Measured, base: BaseModel, output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(measured.to_json(base), indent=1) + "\n", encoding="utf-8")


def _load(model: str, dtype: torch.dtype) -> BaseModel:
    return load_base(model, dtype=dtype)


def main(arguments: list[str] | None = None) -> None:
    """Parses arguments, measures, prints tables and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="base model: smollm2, a folder, or a hub name")
    parser.add_argument("--only", type=int, nargs="+", default=sorted(NEEDS), choices=sorted(NEEDS), help="figures")
    parser.add_argument("--rows", nargs="+", default=STAGES, choices=STAGES, help="lengths prompt:response, or ConvArg")
    parser.add_argument("--pairs", type=int, default=4, help="comparisons of a step")
    parser.add_argument("--repetitions", type=int, default=5, help="counted rounds")
    parser.add_argument("--quick", action="store_true", help="two repetitions")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--memory", metavar="CONTENDER", help="print the peak memory of one contender and nothing else")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    share_one_heap()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if args.memory:
        return memory_cell(args.memory, args)
    args.repetitions = 2 if args.quick else args.repetitions
    print(run(args))
    return None


if __name__ == "__main__":
    main()
