"""The exact E-step."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.estep.result import EStep
from prefmix.mixture.posterior import posterior


def exact(
    log_weights: Float[Tensor, "G K"],
    log_lik: Float[Tensor, "G K"],
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> EStep:
    """q_gk = w_gk p_gk / sum_j w_gj p_gj: the posterior, where the ELBO touches the log evidence.

    `temperature` and `generator` are not used.
    """
    log_q = posterior(log_weights.detach(), log_lik.detach()).log_resp
    return EStep(log_q.exp(), log_q)
