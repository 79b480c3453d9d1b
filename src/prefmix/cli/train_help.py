"""Flags of `prefmix train`, made from the fields: short help for a first run, `--help all` for every field."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any

from prefmix.cli.fields import COMMON_TRAINER_FIELDS, FieldDoc, all_fields
from prefmix.cli.recipe import parse_scalar

_GROUPS = {
    "data": "data and model",
    "mixture": "the mixture",
    "run": "transformers' fields with another default here, and why",
    "trainer": "transformers' TrainingArguments",
}
# Read only where another field says so, or right as they are: the short help leaves them out.
_DEPENDENT = (
    *("precompute_ref_log_probs", "m_step_samples", "m_step_threshold", "probe_restarts", "probe_dim"),
    *("label_smoothing", "simpo_gamma", "tie_strength", "dr_dpo_beta", "adaptive_beta", "label_noise_prior"),
    *("robust_step", "estep_temperature", "estep_temperature_end", "gumbel_hard"),
    *("membership_dim", "membership_samples", "membership_estep", "kl_annealing", "free_bits", "combine"),
    "metadata_prior",
)
_WIDTH = 118
_SHOWN_CHOICES = 6


def add_field_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag for each field, without default: only what is written overrides the recipe."""
    for doc in all_fields().values():
        nargs: str | None = "+" if doc.is_list else "?" if doc.is_bool else None
        const = "true" if nargs == "?" else None
        parser.add_argument(
            f"--{doc.name}", nargs=nargs, const=const, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that the command line sets, as a recipe would hold them."""
    given = vars(args)
    return {name: _value(doc, given[name]) for name, doc in all_fields().items() if name in given}


def help_text(every_field: bool) -> str:
    """The fields with types, defaults and help."""
    lines = []
    for origin, title in _GROUPS.items():
        docs = [doc for doc in all_fields().values() if doc.origin == origin]
        if not every_field:
            docs = [doc for doc in docs if doc.name not in _DEPENDENT]
        if origin == "trainer" and not every_field:
            docs = [doc for doc in docs if doc.name in COMMON_TRAINER_FIELDS]
            title += f", those used most (--help all shows {len(all_fields())} fields)"
        lines += ["", f"{title}:", *(line for doc in docs for line in _field_lines(doc))]
    return "\n".join(lines).lstrip("\n")


class HelpAction(argparse.Action):
    """`--help`, and `--help all`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """Prints and leaves."""
        print(parser.format_help() + "\n" + help_text(every_field=values == "all"))
        parser.exit()


def _value(doc: FieldDoc, words: str | Sequence[str]) -> Any:
    if isinstance(words, str):
        return None if words == "null" else words if doc.takes_text else parse_scalar(words)
    values = [parse_scalar(word) for word in words]
    single = len(values) == 1 and (isinstance(values[0], list) or not doc.kind.startswith("list["))
    return values[0] if single else values


def _field_lines(doc: FieldDoc) -> list[str]:
    kind = doc.kind.replace(" | None", "").replace(" ", "")
    choices = "{" + ",".join(doc.choices) + "}" if 0 < len(doc.choices) <= _SHOWN_CHOICES else kind
    many = " ..." if doc.is_list and doc.choices else ""
    default = "" if doc.default in (None, "") else f" [{_spell(doc.default)}]"
    head = f"  --{doc.name} {choices}{many}{default}"
    return [head, *textwrap.wrap(doc.help, _WIDTH, initial_indent="      ", subsequent_indent="      ")]


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
