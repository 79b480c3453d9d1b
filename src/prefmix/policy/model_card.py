"""The README.md of a policy folder: what it is, how to use it, where it came from."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefmix.policy.config import PolicyConfig
from prefmix.policy.user_state import UserState

FILES = (".jsonl", ".json", ".csv", ".gz", ".parquet")

CITATION = r"""@article{bohne2025mixmoedpo,
  title   = {Mix- and MoE-DPO: A Variational Inference Approach to Direct Preference Optimization},
  author  = {Bohne, Jason and Polak, Pawe{\l} and Rosenberg, David and Bloniarz, Brian and Kazantsev, Gary},
  journal = {arXiv preprint arXiv:2510.08256},
  year    = {2025},
  url     = {https://arxiv.org/abs/2510.08256},
}"""

_MIXTURE = """One expert writes one response; which one is drawn
from the weights of the user and the prompt."""
_PRODUCT = """A user's reward is the sum of the
experts', by the weights of the user and the prompt (log-linear). So all experts write every token together: their
geometric mean by these weights, normalised at each token."""

TEMPLATE = """---
library_name: prefmix
pipeline_tag: text-generation
{metadata}tags:
- dpo
- mixture-of-experts
- preference-optimization
- prefmix
---

# A {kind} of {num_experts} expert polic{plural}

{num_experts} polic{plural} over one frozen base model, trained from preferences with
[arXiv 2510.08256](https://arxiv.org/abs/2510.08256) by prefmix. {writing}

```python
from prefmix import MixturePolicy

policy = MixturePolicy.from_pretrained("this/folder")
print(policy.generate("Where is the sun?", decoder="{decoder}"))
```

From a terminal: `prefmix chat this/folder`; `prefmix report this/folder --data held_out.jsonl` shows it in pictures.

| | |
| --- | --- |
{rows}

{figures}The base model's licence is not recorded here and also binds these experts: see the base model's own page.
{users_line}
{adapters_line}

## Provenance

```json
{provenance}
```

## Citation

```bibtex
{citation}
```
"""


def model_card(
    config: PolicyConfig,
    users: UserState | None,
    record: Mapping[str, Any] | None = None,
    metadata_fields: Mapping[str, bool] | None = None,
) -> str:
    """The card's text.

    Args:
        config: what the policy records.
        users: None where user state was left out.
        record: what training cost and reached (`training.json`).
        metadata_fields: field -> whether the gate gives it any weight.
    """
    record = record or {}
    gate_terms, product = config.gate.get("terms", []), config.feedback_model.is_product
    facts = _facts(config) | _metadata_fact(metadata_fields or {}) | _training_facts(config, record)
    return TEMPLATE.format(
        metadata=_metadata(config, record),
        kind="product" if product else "mixture",
        writing=_PRODUCT if product else _MIXTURE,
        decoder="product" if product else "mixture",
        num_experts=config.num_experts,
        plural="y" if config.num_experts == 1 else "ies",
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        figures=_figures(record.get("held_out", {})),
        users_line=_users_line(users, gate_terms),
        adapters_line=_adapters_line(config.experts),
        provenance=json.dumps(dict(config.provenance), indent=2, ensure_ascii=False),
        citation=CITATION,
    )


def _metadata(config: PolicyConfig, record: Mapping[str, Any]) -> str:
    """Lines of the hub's metadata that can be known; names on the hub only, since it refuses others."""
    lines = []
    if _is_hub_name(config.base_source):
        lines.append(f"base_model: {config.base_source}")
        if _adapters_line(config.experts):
            lines.append("base_model_relation: adapter")
    if _is_hub_name(str(record.get("data", ""))):
        lines += ["datasets:", f"- {record['data']}"]
    return "".join(line + "\n" for line in lines)


def _is_hub_name(source: str) -> bool:
    """Whether `source` reads as `owner/name` rather than as a file or folder."""
    is_file = Path(source).exists() or Path(source).suffix in FILES
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None and not is_file


def _facts(config: PolicyConfig) -> dict[str, str]:
    copied = config.base_source == "./base"
    return {
        "base model": "a copy in `base/`" if copied else f"`{config.base_source}`",
        "base SHA-256": f"`{config.base_sha256}`",
        "experts": ", ".join(f"{name} {value}" for name, value in config.experts.items()),
        "beta": ", ".join(f"{beta:g}" for beta in config.beta),
        "label noise": f"{config.label_noise:g}",
        "latent": config.latent,
        "combination": "log-linear (sum of margins)" if config.feedback_model.is_product else "mixture",
        "gate": " + ".join(config.gate.get("terms", [])),
        "somebody unknown": _unknown_fact(config),
        "base runs in": config.dtype or "its own type",
        "saved": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("prefmix", "torch", "transformers")),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def _metadata_fact(fields: Mapping[str, bool]) -> dict[str, str]:
    """Which metadata decide."""
    read = ", ".join(f"`{name}`" for name, heard in fields.items() if heard)
    silent = ", ".join(f"`{name}`" for name, heard in fields.items() if not heard)
    said = read or "no field has any weight"
    return {"metadata": said + (f"; without weight: {silent}" if silent else "")} if fields else {}


def _training_facts(config: PolicyConfig, record: Mapping[str, Any]) -> dict[str, str]:
    """What training read and took, as far as it is known."""
    made = config.provenance
    counts = [(made.get(f"training_{name}"), name) for name in ("rows", "users", "texts")]
    read = ", ".join(f"{count:,} {name}" for count, name in counts if count is not None)
    source = f"`{Path(str(record['data'])).name}`" if record.get("data") else ""
    if _is_hub_name(str(record.get("data", ""))):
        source = f"`{record['data']}`"
    facts = {"trained on": ": ".join(part for part in (source, read) if part)}
    if "data_sha256" in made:
        facts["data SHA-256"] = f"`{made['data_sha256']}`"
    facts["seed"] = str(made.get("seed", ""))
    facts["made good for"] = _robust_fact(record.get("robust", {}))
    if "seconds" in record:
        since = f" since step {record['first_step']}" if record.get("first_step") else ""
        facts["training time"] = f"{record['seconds']:.0f} s, {record['cpu_seconds']:.0f} CPU seconds{since}"
    if "peak_memory_bytes" in record:
        facts["peak memory"] = f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"
    if "trained_parameters" in record:
        facts["parameters"] = f"{record['trained_parameters']:,} trained, {record['base_parameters']:,} of the base"
    facts["trained by"] = str(record.get("machine", ""))
    return {name: value for name, value in facts.items() if value}


def _unknown_fact(config: PolicyConfig) -> str:
    """The weights of somebody about whom nothing is known."""
    if config.default_weights is None:
        return "the gate's weights"
    weights = ", ".join(f"{weight:.3f}" for weight in config.default_weights)
    return f"weights {weights} (`{config.unknown_users['objective']}`)"


def _robust_fact(robust: Mapping[str, Any]) -> str:
    """Over which groups an adversary stood, and which it weighed most at the end; empty without one."""
    if not robust:
        return ""
    named = ", ".join(f"{name} {weight:.2f}" for name, weight in robust["weights"].items())
    weights = f"final weights {named}" if named else f"largest final weight {robust['largest_weight']:.2f}"
    return f"the worst {robust['over']} of {robust['groups']} (group DRO); {weights}"


def _figures(held_out: Mapping[str, float]) -> str:
    """Held-out figures of the log; a coin has accuracy 0.5 and log-loss 0.693."""
    ways = {"with what it knows of users": "", "gate alone": "population_"}
    rows = [
        f"| {way} | {held_out[prefix + 'accuracy']:.3f} | {held_out[prefix + 'loss']:.3f} |"
        for way, prefix in ways.items()
        if {prefix + "accuracy", prefix + "loss"} <= held_out.keys()
    ]
    if not rows:
        return ""
    head = [
        "Held-out preferences, at the end of training:",
        "",
        "| weights | accuracy | log-loss |",
        "| --- | --- | --- |",
    ]
    return "\n".join([*head, *rows, "", ""])


def _adapters_line(experts: Mapping[str, Any]) -> str:
    """What of `expert_k/` other software can load (see `adapters`)."""
    kind, head = experts.get("kind"), experts.get("head")
    if kind == "shared_base" and head in ("hidden", "logit"):
        return "Each `expert_k/` is also a PEFT adapter on `lm_head` that can be loaded alone."
    if kind == "branched" and head != "full" and experts.get("trunk") != "full":
        return "Each `expert_k/` is also a PEFT adapter that can be loaded alone."
    return ""


def _users_line(users: UserState | None, gate_terms: list[str]) -> str:
    if users is None:
        kept = " The gate keeps a row of weights for each training user, without names." if "user" in gate_terms else ""
        return f"User state was left out.{kept}"
    return f"`users/` holds names and evidence of {len(users)} users: treat this folder as personal data." * bool(users)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
