"""E-steps, gate terms and losses of your own, by name, without changing the package: docs/extending.md.

Register before a configuration names them and before a policy that uses them is loaded: a policy's folder holds names
and numbers, never code.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from prefmix.mixture.estep import ESTEPS, EStepFunction
from prefmix.mixture.gate_terms import GATE_TERMS, GateTerm, Reads
from prefmix.mixture.likelihoods.model import LossType
from prefmix.mixture.likelihoods.own import OWN_LOSSES, OwnLoss
from prefmix.training.options import EStepName
from prefmix.training.options import GateTerm as GateTermName
from prefmix.training.registered_names import PROMPT_TERMS, register


def register_estep(name: str, function: EStepFunction) -> None:
    """Makes `estep: name` work.

    Args:
        name: for configurations.
        function: (log_weights [G, K], log_lik [G, K], *, temperature, generator) -> `EStep`; log_lik is what all rows
            of a group say together.

    Raises:
        ValueError: the name is taken.
    """
    register(EStepName, name)
    ESTEPS[name] = function


def register_gate_term(name: str, build: Callable[[int, int], nn.Module], *, reads: Reads) -> None:
    """Makes `gate: [global, name]` work.

    Args:
        name: for configurations and policies.
        build: (D, K) -> a module from features [B, D] to logits [B, K] that start at zero.
        reads: "prompt" (pooled states of the prompt, standardised) or "metadata" (encoded fields).

    Raises:
        ValueError: the name is taken, or `reads` is neither.
    """
    if reads not in ("prompt", "metadata"):
        raise ValueError(f"reads={reads!r}: choose 'prompt' or 'metadata'")
    register(GateTermName, name)
    GATE_TERMS[name] = GateTerm(reads, build)
    if reads == "prompt":
        PROMPT_TERMS.append(name)


def register_loss(name: str, log_lik: Callable[[Tensor, Tensor], Tensor], *, proper: bool = False) -> None:
    """Makes `loss_type: name` work.

    Args:
        name: for configurations and policies.
        log_lik: (margins [B, K], beta [K]) -> minus the loss of each pair, [B, K], nats.
        proper: whether exp(log_lik(m)) + exp(log_lik(-m)) = 1, so that it is a likelihood.

    Raises:
        ValueError: the name is taken.
    """
    register(LossType, name)
    OWN_LOSSES[name] = OwnLoss(log_lik, proper)
