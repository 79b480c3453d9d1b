"""`prefmix report RUN --data held_out.jsonl`: one HTML page that shows what a run learned, for people."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from prefmix.cli.loading import add_columns, load_policy, read_checked_rows, read_policy_config
from prefmix.cli.output import note, stdout_is_for_results
from prefmix.policy.folder import LOG_FILE, run_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("policy", metavar="run", help="the output of a training, or the folder of a policy")
    parser.add_argument("--data", help="held-out rows; without them the page has the log, the people and the cost")
    add_columns(parser)
    parser.add_argument(
        "--output",
        help="where the page goes; default: RUN/report.html, or NAME.html here for a policy alone",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        help="other policies on the same rows, such as single DPO; NAME=FOLDER names",
    )
    parser.add_argument("--examples", type=int, default=4, help="prompts that are answered; 0: nothing is generated")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--no_user_names", action="store_true", help="write numbers instead of users' names")
    parser.add_argument("--no_probe", action="store_true", help="do not compare restarts of the probe (seconds)")
    parser.add_argument("--base", help="the base model, where it has moved since training")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--cache_dir", help="folder of cached trunk states; default: the user's cache folder")
    parser.add_argument("--seed", type=int, default=0, help="of answers, intervals and restarts")


def run(args: argparse.Namespace) -> None:
    """Writes the page and prints where it is."""
    output = _output(args)
    _check(args, output)
    rows = None if args.data is None else read_checked_rows(args.data, args.split, args.user_column)
    with stdout_is_for_results():
        policy = load_policy(args)  # before the imports: it says what takes so long
        from prefmix.evaluation.cached_states import StateCache
        from prefmix.experiments.report_page import report_html
        from prefmix.experiments.run_report import ReportOptions, report_run

        progress = sys.stderr.isatty()
        options = ReportOptions(
            examples=args.examples,
            max_new_tokens=args.max_new_tokens,
            names=not args.no_user_names,
            probe=not args.no_probe,
            seed=args.seed,
            progress=progress,
        )
        data = report_run(
            policy,
            args.policy,
            rows,
            against={name: partial(_load, args, folder) for name, folder in map(_named, args.against)},
            cache=StateCache("disk", args.cache_dir, progress=progress),
            source=Path(args.data).name if args.data else "",
            options=options,
        )
    page = report_html(data)
    replaced = ", in the place of the page that was there" if output.exists() else ""
    output.write_text(page, encoding="utf-8")
    note(f"wrote {len(page.encode()) / 1e6:.2f} MB{replaced}; open it in a browser, it needs no network")
    print(output)


def _output(args: argparse.Namespace) -> Path:
    """Where the page goes: every run has its own."""
    if args.output is not None:
        return Path(args.output)
    folder = run_folder(Path(args.policy))
    return folder / "report.html" if (folder / LOG_FILE).is_file() else Path(f"{folder.name}.html")


def _check(args: argparse.Namespace, output: Path) -> None:
    if args.examples < 0:
        raise ValueError(f"--examples {args.examples}: give 0 (nothing is generated) or a number of prompts")
    if args.max_new_tokens < 1:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens}: give at least 1, or --examples 0 to generate nothing"
        )
    if args.against and args.data is None:
        raise ValueError("--against compares policies on held-out rows: name them with --data")
    read_policy_config(args)
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: {output.parent} is no folder; make it first")
    for _, policy in map(_named, args.against):
        read_policy_config(argparse.Namespace(policy=policy))


def _named(text: str) -> tuple[str, str]:
    """`NAME=FOLDER`, or a folder that is called by its own name."""
    name, equals, folder = text.partition("=")
    return (name, folder) if equals and not os.path.exists(text) else (Path(text).name, text)


def _load(args: argparse.Namespace, folder: str):  # type: ignore[no-untyped-def]
    return load_policy(argparse.Namespace(policy=folder, base=args.base, device=args.device))
