"""The annealed E-step."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.estep.result import EStep
from prefmix.mixture.posterior import posterior


def annealed(
    log_weights: Float[Tensor, "G K"],
    log_lik: Float[Tensor, "G K"],
    *,
    temperature: float,
    generator: torch.Generator | None = None,
) -> EStep:
    """q_gk proportional to (w_gk p_gk)^(1/tau): softer than the posterior above tau = 1, the posterior at tau = 1.

    Soft responsibilities early on keep experts from confirming their first guesses. `generator` is not used.
    Source: Ueda & Nakano 1998, deterministic annealing EM.
    """
    log_resp = posterior(log_weights.detach(), log_lik.detach()).log_resp
    log_q = torch.log_softmax(log_resp / temperature, dim=-1)
    return EStep(log_q.exp(), log_q)
