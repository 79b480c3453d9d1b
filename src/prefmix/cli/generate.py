"""`prefmix generate POLICY --prompt ... --user anna`: one answer."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from prefmix.cli.loading import add_policy, load_policy, read_policy_config
from prefmix.cli.output import note, stdout_is_for_results
from prefmix.cli.recipe import parse_scalar
from prefmix.policy.folder import METADATA_FILE, find_policy

if TYPE_CHECKING:
    from prefmix.policy.mixture_policy import MixturePolicy
    from prefmix.policy.prompts import Prompt


DECODERS = ("sample", "mixture", "top", "product")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_policy(parser)
    parser.add_argument("--prompt", help="what to answer; default: standard input")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--raw", action="store_true", default=None, help="the prompt as it stands, without a chat template"
    )
    form.add_argument(
        "--no_raw",
        dest="raw",
        action="store_false",
        default=None,
        help="the prompt in the model's chat template; default: as training rows were written",
    )
    add_sampling(parser)
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds who asks and how tokens are drawn."""
    parser.add_argument("--user", help="a known user; default: the weights of the population")
    parser.add_argument(
        "--objective",
        choices=("max_min", "min_max_regret"),
        help="weights for somebody unknown: best for the type of user who fares worst, or with the least regret; "
        "default: the gate",
    )
    parser.add_argument("--metadata", help="metadata of the user or row, as YAML: '{user_age: 30}'")
    parser.add_argument(
        "--decoder",
        choices=DECODERS,
        help="sample: one expert for the whole answer (exact); mixture: every token from the mixture (exact); "
        "top: the heaviest expert; product: every token from the experts' geometric mean; default: product for "
        "policies of combine: log_linear, else sample",
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus of each expert")
    parser.add_argument("--top_k", type=int, default=0, help="most probable tokens of each expert; 0: all")
    parser.add_argument("--seed", type=int, help="same seed, same answer")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `MixturePolicy.generate`, checked before the model is loaded.

    Raises:
        ValueError: metadata that is not a mapping, or that the policy would not read.
    """
    metadata = None if args.metadata is None else parse_scalar(args.metadata)
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"--metadata {args.metadata!r}: write a mapping, for example '{{user_age: 30}}'")
    if metadata:
        _check_is_read(args, metadata)
    names = ("user", "decoder", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
    if args.objective and args.user:
        raise ValueError(f"--objective with --user {args.user}: it is for somebody unknown; leave one of them out")
    return {name: getattr(args, name) for name in names} | {"metadata": metadata}


def objective_weights(args: argparse.Namespace, policy: MixturePolicy) -> dict[str, Any]:
    """`weights` of `--objective`, where one is named."""
    return {"weights": policy.unknown_user_weights(args.objective).weights} if args.objective else {}


def _check_is_read(args: argparse.Namespace, metadata: dict[str, Any]) -> None:
    terms = read_policy_config(args).gate["terms"]
    if "metadata" not in terms:
        raise ValueError(
            f"--metadata: this policy's gate reads {', '.join(terms)} and no metadata; leave the flag out, or train "
            "with gate: [metadata]"
        )
    from prefmix.data.users import MetadataEncoder

    text = (find_policy(args.policy) / METADATA_FILE).read_text(encoding="utf-8")
    encoder = MetadataEncoder.from_dict(json.loads(text))
    ignored = encoder.ignored(metadata)
    if unknown := [name for name in ignored if name in metadata]:
        raise ValueError(
            f"--metadata: the gate knows no {', '.join(unknown)}; it was trained on {', '.join(encoder.feature_names)}"
        )
    if ignored:
        note(f"{', '.join(ignored)} did not occur in training and counts as unknown")


def _asked(prompt: str, policy: MixturePolicy, raw: bool | None) -> Prompt:
    """The prompt as text or as a user's message."""
    from prefmix.policy.row_form import PLAIN

    if raw is None:
        raw = policy.config.row_form == PLAIN
    chats = policy.tokenizer.chat_template is not None and not raw
    return [{"role": "user", "content": prompt}] if chats else prompt


def run(args: argparse.Namespace) -> None:
    """Prints the answer, and nothing else, on stdout."""
    options = sampling(args)
    prompt = args.prompt if args.prompt is not None else sys.stdin.read().strip()
    if not prompt:
        raise ValueError("--prompt is empty; write what to answer")
    with stdout_is_for_results():
        policy = load_policy(args)
        options |= objective_weights(args, policy)
    asked = _asked(prompt, policy, args.raw)
    if not args.stream:
        print(policy.generate(asked, **options))
        return
    for piece in policy.generate(asked, stream=True, **options):
        print(piece, end="", flush=True)
    print()
