"""Cheap M-steps: which experts learn from a row, and how strongly.

The M-step raises sum_i a_i sum_k q_ik log p_ik. A log-likelihood costs a forward pass, its gradient two more; so all K
experts are looked at, and only those that a row draws, or leans on, learn from it.

Legend: B rows, K experts, S draws.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

# (resp [B, K], *, samples, threshold, generator) -> coefficients [B, K]
MStepFunction = Callable[..., Float[Tensor, "B K"]]


def every_expert(
    resp: Float[Tensor, "B K"], *, samples: int = 1, threshold: float = 0.0, generator: torch.Generator | None = None
) -> Float[Tensor, "B K"]:
    """c_ik = q_ik: the whole M-step. `samples`, `threshold` and `generator` are not used."""
    return resp


def sampled_experts(
    resp: Float[Tensor, "B K"], *, samples: int = 1, threshold: float = 0.0, generator: torch.Generator | None = None
) -> Float[Tensor, "B K"]:
    """c_ik = n_ik / S, with n_i a multinomial draw of S experts from q_i; rows are drawn independently.

    E[c] = q at fixed q, so the gradient of the M-step is unbiased: E[sum_k c_k d log p_k] = sum_k q_k d log p_k. At
    most S experts of a row learn.

    Args:
        resp: [B, K] q, rows sum to 1.
        samples: S >= 1.
        threshold: not used.
        generator: source of the draws; None: the default one of the device.

    Source: Monte Carlo EM (Wei & Tanner 1990), here for the gradient alone.
    """
    # The first of K exponential clocks with rates q rings. (torch.multinomial raises on NaN before the guard speaks.)
    clocks = torch.empty(len(resp), samples, resp.shape[1], dtype=resp.dtype, device=resp.device)
    drawn = (resp.unsqueeze(1) / clocks.exponential_(generator=generator)).argmax(-1)
    return torch.zeros_like(resp).scatter_add_(1, drawn, torch.full_like(drawn, 1.0 / samples, dtype=resp.dtype))


def top_experts(
    resp: Float[Tensor, "B K"], *, samples: int = 1, threshold: float = 0.1, generator: torch.Generator | None = None
) -> Float[Tensor, "B K"]:
    """c_ik = q_ik where q_ik >= threshold or q_ik is the row's largest, else 0.

    Biased: an expert never learns from rows that it explains badly, sum_k c_k is less than 1, and the part left out is
    the same in every step. What an expert does learn from, it weighs as the whole M-step does.

    Args:
        resp: [B, K] q, rows sum to 1.
        samples: not used.
        threshold: between 0 (the whole M-step) and 1 (one expert a row).
        generator: not used.

    Source: sparse EM, Neal & Hinton 1998, without its refreshes of the frozen part.
    """
    largest = torch.zeros_like(resp, dtype=torch.bool).scatter_(1, resp.argmax(1, keepdim=True), True)
    return torch.where(largest | (resp >= threshold), resp, 0.0)


M_STEPS: dict[str, MStepFunction] = {"all": every_expert, "sampled": sampled_experts, "top": top_experts}


def with_gradient_of(
    bound: Float[Tensor, "B"],
    log_lik: Float[Tensor, "B K"],
    coefficient: Float[Tensor, "B K"],
    weight: Float[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """The value of `bound`, with the gradient of a_i sum_k c_ik log p_ik added to its own.

    So the loss that is logged is the bound at q, however few experts a step teaches.

    Args:
        bound: [B] ELBO of rows computed from detached log-likelihoods.
        log_lik: [B, K] log p_ik with gradient, wherever c_ik is not 0.
        coefficient: [B, K] c.
        weight: [B] a_i.
    """
    taught = torch.where(coefficient != 0, coefficient * log_lik, 0.0).sum(1) * weight.to(log_lik.dtype)
    return bound + (taught - taught.detach())
