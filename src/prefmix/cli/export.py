"""`prefmix export POLICY --format peft|merged|servers --output DIR [--expert K]`: experts for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefmix.cli.loading import add_policy, load_policy
from prefmix.cli.output import note, stdout_is_for_results

NEXT = {
    "peft": 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{1}"), "{0}")',
    "merged": 'AutoModelForCausalLM.from_pretrained("{0}")',
    "servers": "{0}/README.md says which servers load it and how to sample the mixture",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_policy(parser)
    parser.add_argument(
        "--format",
        choices=tuple(NEXT),
        required=True,
        help="peft: one expert as a LoRA adapter; merged: one expert as a whole model; servers: all experts as "
        "adapters, with names, weights and a guide, for a multi-LoRA server",
    )
    parser.add_argument("--output", required=True, help="a folder that does not exist yet")
    parser.add_argument("--expert", type=int, help="which expert, counted from 0 (peft, merged)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="merged: type of the weights")
    parser.add_argument("--with_base", action="store_true", help="servers: also the base model, for servers without it")
    parser.add_argument("--users", action="store_true", help="servers: also every known user's weights (personal data)")


def run(args: argparse.Namespace) -> None:
    """Checks what is cheap, then writes the folder."""
    _check(args)
    with stdout_is_for_results():
        policy = load_policy(args)
        if args.format == "servers":
            from prefmix.policy.server_export import export_servers

            export_servers(policy, args.output, users=args.users, with_base=args.with_base)
        elif args.format == "peft":
            from prefmix.policy.export import export_adapter

            export_adapter(policy, args.expert, args.output)
        else:
            import torch

            from prefmix.policy.export import export_merged

            dtype = getattr(torch, args.dtype) if args.dtype else None
            export_merged(policy, args.expert, args.output, dtype=dtype)
    print(args.output)
    from prefmix.policy.export import base_place

    base = args.base or base_place(policy)
    note(NEXT[args.format].format(args.output, base))
    if args.format == "peft" and Path(base).exists():
        note("that base is a folder of this machine: take it along, or use --format merged")


def _check(args: argparse.Namespace) -> None:
    if (args.expert is None) is (args.format != "servers"):
        if args.expert is None:
            raise ValueError(f"--format {args.format}: name an expert with --expert 0 (or another number)")
        raise ValueError(f"--format servers with --expert {args.expert}: leave --expert out, it exports all of them")
    for name, fitting in (("dtype", "merged"), ("users", "servers"), ("with_base", "servers")):
        if getattr(args, name) and args.format != fitting:
            raise ValueError(f"--{name}: only --format {fitting} reads it")
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {args.output}: exists already; choose another folder (nothing is overwritten)")
