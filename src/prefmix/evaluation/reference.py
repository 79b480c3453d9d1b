"""The reference of a policy's experts as a policy of its own, to write and be measured like them."""

from __future__ import annotations

from prefmix.experts.independent import IndependentExperts
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy


def reference_policy(policy: MixturePolicy) -> MixturePolicy | None:
    """One untrained expert over the frozen base, which it shares with `policy`: pi = pi_ref exactly.

    Returns:
        None where whole models have references of their own (`reference: per_expert`): there is no one reference.
    """
    experts, config = policy.model.experts, policy.config
    if isinstance(experts, IndependentExperts) and any(own is not None for own in experts.references):
        return None
    # Heads are made on the CPU in float32; the base is where it was, and stays there.
    untrained = SharedBaseExperts(experts.base_model, 1, rank=1).to(next(experts.parameters()).device)
    gate = Gate(1, ("global",))
    alone = PolicyConfig(
        (1.0,), "pair", config.base_source, config.base_sha256, experts=untrained.describe(), gate=gate.describe()
    )
    return MixturePolicy(MixtureModel(untrained, gate), policy.tokenizer, alone)
