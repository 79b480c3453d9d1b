"""The sampled E-step: Gumbel-Softmax samples of the posterior."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.estep.result import EStep
from prefmix.mixture.posterior import posterior


def gumbel(
    log_weights: Float[Tensor, "G K"],
    log_lik: Float[Tensor, "G K"],
    *,
    temperature: float,
    generator: torch.Generator | None = None,
    hard: bool = True,
) -> EStep:
    """z_g = softmax((log q_g + Gumbel noise) / tau), or its argmax as a one-hot vector.

    The noise is added to the *posterior's* logits; added to the gate's it would optimise a looser bound. One-hot
    samples have the mean q, at every temperature, so the gradient is unbiased; relaxed ones have it only as tau -> 0.
    Responsibilities are held fixed in the M-step, so a straight-through gradient has nowhere to go here.

    Args:
        log_weights: [G, K] log w.
        log_lik: [G, K] log-likelihood of each group, nats.
        temperature: tau > 0.
        generator: source of the noise.
        hard: one-hot samples; False gives relaxed ones.

    Returns:
        EStep with resp the sample and log_q the exact log posterior.

    Source: Jang et al. 2017; Maddison et al. 2017; method fact 4.
    """
    log_q = posterior(log_weights.detach(), log_lik.detach()).log_resp
    noise = -torch.empty_like(log_q).exponential_(generator=generator).log()
    perturbed = log_q + noise
    if hard:
        best = perturbed.argmax(dim=-1, keepdim=True)
        return EStep(torch.zeros_like(log_q).scatter(-1, best, 1.0), log_q)
    return EStep(torch.softmax(perturbed / temperature, dim=-1), log_q)
