"""Experts moved along the line from the reference through what they learned, without training.

    logits_s = logits_ref + s (logits_k - logits_ref),    pi_s proportional to pi_ref (pi_k / pi_ref)^s, token by token

s = 0 is the reference, s = 1 the policy. A frontier of reward against KL from one training run: what another beta would
give, approximately. Source: Liu et al. 2024, decoding-time realignment (arXiv 2402.02992), eq. 6.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from prefmix.experts.low_rank_states import State, pairs
from prefmix.experts.recombine import with_states
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy


def at_strength(policy: MixturePolicy, strength: float) -> MixturePolicy:
    """The policy with every expert's correction multiplied by `strength`; gate and users stay as they are.

    Args:
        policy: low-rank heads on a frozen trunk, where the correction of the logits is linear in U.
        strength: s, at least 0; above 1 extrapolates.

    Raises:
        ValueError: other experts, or a negative or infinite strength.
    """
    experts = policy.model.experts
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength={strength!r}: give 0 (the reference), 1 (the policy) or another positive number")
    if not isinstance(experts, SharedBaseExperts) or experts.head_kind not in ("hidden", "logit"):
        raise ValueError("at_strength: only low-rank heads on a frozen trunk are linear in what they add to the logits")
    states = [_scaled(experts.expert_state(k), strength) for k in range(experts.num_experts)]
    changed = with_states(experts, states)
    provenance = dict(policy.config.provenance)
    provenance["changes"] = [*provenance.get("changes", ()), f"strength {strength:g}"]
    config = replace(policy.config, experts=changed.describe(), provenance=provenance)
    model = MixtureModel(changed, policy.model.gate)
    return MixturePolicy(model, policy.tokenizer, config, policy.users, policy.metadata_encoder)


def _scaled(state: State, strength: float) -> dict[str, Tensor]:
    ups = set(pairs(state).values())
    return {name: strength * value if name in ups else value for name, value in state.items()}
