"""`prefmix probe rows.jsonl --model smollm2`: groups of users, before a single expert is trained."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmix.cli.loading import add_columns, read_checked_rows
from prefmix.cli.model_check import check_model
from prefmix.cli.output import add_format, note, print_json, stdout_is_for_results
from prefmix.training.options import MixtureOptions

if TYPE_CHECKING:
    from prefmix.experiments.probe_report import ProbeReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("data", help="rows (every format that `prefmix validate` reads); a `user` column finds groups")
    add_columns(parser)
    parser.add_argument("--model", default="smollm2", help="base model whose states are pooled (default smollm2)")
    parser.add_argument(
        "--num_experts",
        type=int,
        nargs="+",
        default=[1, 2, 3, 4],
        help="numbers of groups to compare, 1 2 3 4 by default",
    )
    parser.add_argument("--probe_dim", type=int, default=64, help="principal directions of the pooled states")
    parser.add_argument("--probe_restarts", type=int, default=8, help="random starts of each fit")
    parser.add_argument("--max_length", type=int, default=1024, help="longest prompt plus completion in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of splits and starts")
    parser.add_argument("--cache_dir", help="folder of cached trunk states; default: the user's cache folder")
    parser.add_argument("--output", help="where the report goes as JSON")
    add_format(parser)


def run(args: argparse.Namespace) -> None:
    """Reads every text once through the frozen trunk, then fits mixtures of linear rewards."""
    rows = read_checked_rows(args.data, args.split, args.user_column)
    check_model(args.model)
    with stdout_is_for_results():
        report = _probe(args, rows)
    advice, command = next_step(report), train_command(args, report.num_experts)
    entries = report.to_dict() | {"next": {"advice": advice, "command": command}}
    if args.output:
        Path(args.output).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        note(f"wrote the report to {args.output}")
    print_json(entries) if args.format == "json" else print(f"{report.text()}\n\nnext: {advice}\n  {command}")


def next_step(report: ProbeReport) -> str:
    """What to do with the answer, in one line."""
    if report.num_experts > 1:
        return f"train {report.num_experts} experts, one a group"
    if report.identifiable.identified:
        return "one group predicts as well as several, so train one expert (that is plain DPO)"
    return "more rows a user or metadata may part groups; until then, train one expert (that is plain DPO)"


def train_command(args: argparse.Namespace, num_experts: int) -> str:
    """`prefmix train` on the same rows and states; each flag is also a field of a recipe (`prefmix init`)."""
    words = ["prefmix", "train", "--model", args.model, "--train_data", args.data]
    words += ["--train_split", args.split] if args.split else []
    words += ["--user_column", args.user_column] if args.user_column else []
    words += ["--output_dir", "out", "--num_experts", str(num_experts)]
    defaults = {option.name: option.default for option in dataclasses.fields(MixtureOptions)}
    for name in ("probe_dim", "probe_restarts", "max_length", "cache_dir"):
        if (value := getattr(args, name)) != defaults[name]:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _probe(args: argparse.Namespace, rows: list[dict[str, Any]]) -> ProbeReport:
    from prefmix.data.tokenization import tokenize_rows
    from prefmix.experiments.probe_report import probe_rows
    from prefmix.experts.base_model import load_base
    from prefmix.experts.trunk_cache import build_trunk_states

    base, watched = load_base(args.model), sys.stderr.isatty()
    assert base.tokenizer is not None, "a model that is loaded by name comes with its tokenizer"
    table = tokenize_rows(rows, base.tokenizer, max_length=args.max_length, progress=watched)
    states = build_trunk_states(base, table.texts, cache_dir=args.cache_dir, progress=watched)
    return probe_rows(
        table,
        states,
        candidates=args.num_experts,
        dim=args.probe_dim,
        restarts=args.probe_restarts,
        seed=args.seed,
    )
