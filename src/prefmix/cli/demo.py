"""`prefmix demo`: the main job on rows that ship with the package and a real language model."""

from __future__ import annotations

import argparse
import sys

from prefmix.cli.model_check import check_model
from prefmix.cli.output import stdout_is_for_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--output_dir", default="demo", help="report, pictures and policies (default: demo)")
    parser.add_argument("--model", default="smollm2", help="base model (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--seed", type=int, default=0, help="of splits, heads and order")


def run(args: argparse.Namespace) -> None:
    """Real people first, planted groups second; the story on stdout, progress on stderr."""
    check_model(args.model)
    story = sys.stdout

    def say(paragraph: str) -> None:
        print(paragraph, file=story, flush=True)

    with stdout_is_for_results():
        from prefmix.experiments.demo import run_demo

        run_demo(args.output_dir, seed=args.seed, model=args.model, say=say)
