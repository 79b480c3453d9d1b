"""`docs/config.md`, made from the fields: `python -m prefmix.cli.config_page > docs/config.md`."""

from __future__ import annotations

from prefmix.cli.fields import FieldDoc, Origin, all_fields

_HEAD = """# Configuration

Made from the fields themselves by `make docs`; edit their help in `src/prefmix/training/options.py`, not this page.

Every field works in a recipe (`num_experts: 4`), as a flag (`--num_experts 4`), and as an argument of `MixtureConfig`
(the first table's fields belong to the run: in Python they are arguments of `MixtureTrainer`). Every field of
`transformers.TrainingArguments` is accepted too; `prefmix train --help all` lists them.
"""
_TITLES: dict[Origin, str] = {
    "data": "Data and model",
    "mixture": "The mixture",
    "run": "Fields of transformers with another default here, and why",
}
_TAIL = """
## Combinations that are refused

They fail when the configuration is read, each with a remedy: a gate term `prompt` or `user` with `latent: user` (see
[theory](theory.md)); a list of betas whose length is not `num_experts`; `gate_update: fixed` with a gate that is not
purely global; temperatures with `estep: exact`; `head: none` at `branch_depth: 0` and `head: full` at any other;
a trained `trunk` with `branch_depth: -1`; `cache_states: disk` or `memory` where experts read more than the trunk's
last states (branches, a trained trunk, whole models); `bf16` with `trunk: full`; `fp16` where blocks train (branches,
a trained trunk, whole models) or with `bf16`; options of whole models (`expert_models`, `reference`, `expert_devices`)
without `expert_kind: independent`, and those of heads and branches with it; `gradient_checkpointing` with nothing
below the heads that trains; `init: experts` and `train_experts: false` without experts that come trained
(`init_experts`); a `likelihood` other than `mbt` with anything of EM; `ties`, `label_noise`, `label_smoothing` and
`token_dropout` with a `loss_type` that does not go with them.
"""


def config_page() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    for origin, title in _TITLES.items():
        parts += [f"\n## {title}\n", "| field | type | default | meaning |", "| --- | --- | --- | --- |"]
        parts += [_row(doc) for doc in all_fields().values() if doc.origin == origin]
    return "\n".join(parts) + "\n" + _TAIL


def _row(doc: FieldDoc) -> str:
    kind = ", ".join(f"`{choice}`" for choice in doc.choices) if doc.choices else doc.kind.replace(" | ", " or ")
    kind = f"list of {kind}" if doc.choices and doc.is_list else kind
    default = "" if doc.default is None else f"`{str(doc.default).lower() if doc.is_bool else doc.default}`"
    return f"| `{doc.name}` | {kind} | {default} | {doc.help} |"


if __name__ == "__main__":
    print(config_page(), end="")
