"""The README.md of a policy folder: what it is, how to use it, where it came from."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prefmix.policy.config import PolicyConfig
from prefmix.policy.user_state import UserState

CITATION = """@article{mixdpo2025,
  title  = {Mix- and MoE-DPO: A Variational Inference Approach to Direct Preference Optimization},
  journal = {arXiv preprint arXiv:2510.08256},
  year   = {2025},
  url    = {https://arxiv.org/abs/2510.08256},
}"""

TEMPLATE = """---
library_name: prefmix
{base_line}tags:
- dpo
- mixture-of-experts
- preference-optimization
- prefmix
---

# A mixture of {num_experts} expert policies

{num_experts} policies over one frozen base model, trained from preferences with
[arXiv 2510.08256](https://arxiv.org/abs/2510.08256) by prefmix. One expert writes one response; which one is drawn
from the weights of the user and the prompt.

```python
from prefmix import MixturePolicy

policy = MixturePolicy.from_pretrained("this/folder")
print(policy.generate("Where is the sun?", decoder="mixture"))
```

| | |
| --- | --- |
{rows}

The base model's licence is not recorded here and also binds these experts: see the base model's own page.
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


def model_card(config: PolicyConfig, users: UserState | None) -> str:
    """The card's text; `users=None` where user state was left out."""
    copied = config.base_source == "./base"
    is_hub_name = config.base_source.count("/") == 1 and not config.base_source.startswith((".", "/"))
    gate_terms = config.gate.get("terms", [])
    facts = {
        "base model": "a copy in `base/`" if copied else f"`{config.base_source}`",
        "base SHA-256": f"`{config.base_sha256}`",
        "experts": ", ".join(f"{name} {value}" for name, value in config.experts.items()),
        "beta": ", ".join(f"{beta:g}" for beta in config.beta),
        "label noise": f"{config.label_noise:g}",
        "latent": config.latent,
        "gate": " + ".join(gate_terms),
        "base runs in": config.dtype or "its own type",
        "saved": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("prefmix", "torch", "transformers")),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    return TEMPLATE.format(
        base_line=f"base_model: {config.base_source}\n" if is_hub_name else "",
        num_experts=config.num_experts,
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        users_line=_users_line(users, gate_terms),
        adapters_line=_adapters_line(config.experts),
        provenance=json.dumps(dict(config.provenance), indent=2, ensure_ascii=False),
        citation=CITATION,
    )


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
