"""A mixture as a folder that a stock multi-LoRA server loads: K adapters, their names and weights, and a guide."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prefmix.experts.smollm2 import loadable_source
from prefmix.policy.config import PolicyConfig
from prefmix.policy.expert_files import can_be_found_again
from prefmix.policy.export import absolute_place, put_adapter
from prefmix.policy.folder import fresh_folder
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.server_guide import server_guide

FORMAT_VERSION = 1
MIXTURE_FILE = "mixture.json"


def export_servers(policy: MixturePolicy, folder: str | Path, *, users: bool = False, with_base: bool = False) -> None:
    """Writes `expert_k/` (PEFT adapters), `mixture.json` and a README that says how to serve them.

    Whoever draws expert k with its weight and then asks the server for one response of adapter k samples the mixture
    exactly; for a log-linear policy the guide says what its product is instead. A base that nobody else could find is
    copied to `base/`, which the adapters name in full, and `mixture.json` and the guide as seen from the folder.

    Args:
        policy: experts that are low-rank updates of one base.
        folder: a folder that does not exist yet.
        users: also write every known user's weights: personal data.
        with_base: also copy a base that servers could find (on the hub) or be given: the folder is complete then.

    Raises:
        ValueError: experts without adapters (whole models, full heads), or the folder exists.
    """
    with fresh_folder(Path(folder)) as place:
        base = named = absolute_place(loadable_source(policy.config.base_source))
        if with_base or not can_be_found_again(base):
            base, named = "base", os.path.join(os.path.abspath(folder), "base")
            policy.model.experts.base_model.save_pretrained(str(place / "base"))
            policy.tokenizer.save_pretrained(str(place / "base"))
        for expert in range(policy.config.num_experts):
            (place / f"expert_{expert}").mkdir()
            put_adapter(policy, expert, place / f"expert_{expert}", named)
        adapter = json.loads((place / "expert_0" / "adapter_config.json").read_text(encoding="utf-8"))
        description = _description(policy, base, adapter, users)
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (place / MIXTURE_FILE).write_text(text, encoding="utf-8")
        (place / "README.md").write_text(server_guide(description), encoding="utf-8")


def _description(policy: MixturePolicy, base: str, adapter: dict[str, Any], users: bool) -> dict[str, Any]:
    config: PolicyConfig = policy.config
    weights = policy.gate_weights().tolist()
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "base_model": base,
        "base_source": config.base_source,
        "base_sha256": config.base_sha256,
        "rank": adapter["r"],
        "target_modules": adapter["target_modules"],
        "experts": [
            {"name": f"expert_{k}", "path": f"expert_{k}", "weight": weights[k], "beta": config.beta[k]}
            for k in range(config.num_experts)
        ],
        "latent": config.latent,
        "combine": "log_linear" if config.feedback_model.is_product else "mixture",
        "gate": list(policy.model.gate.terms),
    }
    if users:
        description["users"] = {name: policy.weights(user=name).tolist() for name in policy.users.names}
    return description
