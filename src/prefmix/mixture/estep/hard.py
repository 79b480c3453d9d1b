"""The hard E-step (classification EM)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.estep.result import EStep
from prefmix.mixture.posterior import posterior


def hard(
    log_weights: Float[Tensor, "G K"],
    log_lik: Float[Tensor, "G K"],
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> EStep:
    """q_g puts everything on the expert with the largest w_gk p_gk (the first one, where several are equal).

    `temperature` and `generator` are not used. Source: Celeux & Govaert 1992.
    """
    log_resp = posterior(log_weights.detach(), log_lik.detach()).log_resp
    best = log_resp.argmax(dim=-1, keepdim=True)
    return EStep(
        torch.zeros_like(log_resp).scatter(-1, best, 1.0),
        torch.full_like(log_resp, -math.inf).scatter(-1, best, 0.0),
    )
