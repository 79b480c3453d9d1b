"""Every field that a recipe may set, with type, default and help, known without importing torch.

Four sources, the earlier one winning where names meet: the run's data and model (here), `MixtureOptions` and
`RunOptions` (`training/options.py`), and `transformers.TrainingArguments`, whose source text is parsed because
importing it takes seconds.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from prefmix.training.options import MixtureOptions, RunOptions

Origin = Literal["data", "mixture", "run", "trainer"]

# TrainingArguments fields that a first run touches; `--help` shows these, `--help all` shows every one.
COMMON_TRAINER_FIELDS = (
    "num_train_epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "eval_strategy",
    "eval_steps",
    "save_steps",
    "resume_from_checkpoint",
    "seed",
    "use_cpu",
)


class FieldDoc(NamedTuple):
    """One field of a recipe.

    Attributes:
        name: as in the dataclass, with underscores.
        kind: its annotation as text, for example `float | None`.
        choices: the allowed values where the annotation is a `Literal`.
        default: the default; None where there is none or where it is computed.
        help: one sentence.
        origin: which source it comes from.
    """

    name: str
    kind: str
    choices: tuple[str, ...]
    default: Any
    help: str
    origin: Origin

    @property
    def is_list(self) -> bool:
        """Whether the flag takes several values."""
        return "list[" in self.kind

    @property
    def is_bool(self) -> bool:
        """Whether the bare flag means true."""
        return "bool" in self.kind and "dict" not in self.kind

    @property
    def takes_text(self) -> bool:
        """Whether a value stays the text it is (a path such as 123 is no number)."""
        return set(self.kind.replace(" ", "").split("|")) <= {"str", "None"}


@dataclass
class RunFields:
    """What a run reads and writes."""

    model: str | None = field(
        default=None,
        metadata={"help": "Base model: a folder, a hub name, or smollm2 (SmolLM2-135M-Instruct, fetched where it is)."},
    )
    train_data: str | None = field(
        default=None,
        metadata={"help": "Training comparisons: .jsonl[.gz], .json, .csv, .parquet, a datasets folder, a hub name."},
    )
    train_split: str | None = field(default=None, metadata={"help": "Split of train_data where it has several."})
    user_column: str | None = field(
        default=None, metadata={"help": "Column of train_data and eval_data that names who judged; null: `user`."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out comparisons, scored during and after training (same formats)."}
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split of eval_data where it has several."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the trained policy and checkpoints."})


@cache
def all_fields() -> dict[str, FieldDoc]:
    """Every field by name, in the order in which help shows them."""
    fields: dict[str, FieldDoc] = {}
    for doc in (
        *_dataclass_fields(RunFields, "data"),
        *_dataclass_fields(MixtureOptions, "mixture"),
        *_dataclass_fields(RunOptions, "run"),
        *_trainer_fields(),
    ):
        known = fields.setdefault(doc.name, doc)
        if not known.choices:
            fields[doc.name] = known._replace(choices=doc.choices)
    return fields


def _dataclass_fields(owner: Any, origin: Origin) -> list[FieldDoc]:
    hints = get_type_hints(owner)
    docs = []
    for item in dataclasses.fields(owner):
        hint = hints[item.name]
        literal = next((part for part in (hint, *get_args(hint)) if get_origin(part) is Literal), None)
        choices = tuple(str(choice) for choice in get_args(literal)) if literal else ()
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        docs.append(FieldDoc(item.name, _spell(hint), choices, default, str(item.metadata.get("help", "")), origin))
    return docs


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "str"
    if get_origin(hint) is list:
        return f"list[{_spell(get_args(hint)[0])}]"
    if get_args(hint):
        return " | ".join(_spell(part) for part in get_args(hint))
    return "None" if hint is type(None) else hint.__name__


def _trainer_fields() -> list[FieldDoc]:
    tree = ast.parse(_transformers_source("training_args.py"))
    owner = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    enums = _enum_values(tree) | _enum_values(ast.parse(_transformers_source("trainer_utils.py")))
    docs = []
    for node in owner.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            keywords = {word.arg: word.value for word in node.value.keywords}
            kinds = [part.strip() for part in ast.unparse(node.annotation).split("|")]
            choices = next((enums[kind] for kind in kinds if kind in enums), ())
            kind = " | ".join(dict.fromkeys("str" if kind in enums else kind for kind in kinds))
            help_text = str(_metadata(keywords).get("help", "")).replace("%%", "%")
            docs.append(
                FieldDoc(node.target.id, kind, choices, _literal(keywords.get("default")), help_text, "trainer")
            )
    return docs


def _enum_values(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    """Name -> values of the enumerations of text in a module."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "ExplicitEnum" for base in node.bases):
            values = [_literal(item.value) for item in node.body if isinstance(item, ast.Assign)]
            found[node.name] = tuple(str(value) for value in values if value is not None)
    return found


def _transformers_source(file: str) -> str:
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed; run: pip install prefmix")
    return (Path(spec.origin).parent / file).read_text(encoding="utf-8")


def _metadata(keywords: dict[str | None, ast.expr]) -> dict[str, Any]:
    node = keywords.get("metadata")
    if not isinstance(node, ast.Dict):
        return {}
    return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values)}


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
