"""The amortised E-step of discrete latents: a network's logits instead of Bayes' rule.

    logits_g = log w_g + f(log w_g, sum_i a_i log p_i),   q_g = softmax(logits_g)

trained by the bound itself: its gradient flows through q (pathwise), either the whole expectation over K experts or one
Gumbel-Softmax sample. Any q but the posterior gives a looser bound, so how loose is reported: KL(q || posterior).

Legend: G groups, K experts. Source: method fact 4; Kingma & Welling 2014; Jang et al. 2017.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefmix.mixture.estep.result import EStep
from prefmix.mixture.posterior import kl_to_gate, posterior
from prefmix.mixture.precision import at_least_float32

# A weight of zero would be an infinite input.
LOWEST_LOG_WEIGHT = -20.0


class PosteriorNetwork(nn.Module):
    """log weights and summed log-likelihoods of G groups -> logits of q; the gate itself before training."""

    def __init__(self, num_experts: int, hidden: int = 64) -> None:
        """Builds the network.

        Args:
            num_experts: K.
            hidden: units of its two hidden layers.
        """
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * num_experts, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, num_experts),
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, log_weights: Float[Tensor, "G K"], log_lik: Float[Tensor, "G K"]) -> Float[Tensor, "G K"]:
        """Logits of q; nothing flows back into gate and experts, whose gradient is the bound's at fixed q.

        Args:
            log_weights: [G, K] log w.
            log_lik: [G, K] summed log-likelihood of each group, nats.
        """
        log_weights = at_least_float32(log_weights.detach()).clamp(min=LOWEST_LOG_WEIGHT)
        behind = at_least_float32(log_lik.detach())
        behind = behind.amax(dim=-1, keepdim=True) - behind
        # Hundreds of nats behind say hardly more than tens: their logarithm is a size a network can read.
        return log_weights + self.layers(torch.cat([log_weights, -behind.log1p()], dim=-1))


class AmortizedEStep(NamedTuple):
    """An E-step with gradient, and what it costs.

    Attributes:
        estep: `resp` (q or a sample of it) and `log_q`, both with the gradient of the network's parameters.
        gap: [G] KL(q || posterior) = log evidence - ELBO >= 0, nats, detached.
    """

    estep: EStep
    gap: Float[Tensor, "G"]


def amortized(
    log_weights: Float[Tensor, "G K"],
    log_lik: Float[Tensor, "G K"],
    logits: Float[Tensor, "G K"],
    *,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> AmortizedEStep:
    """Q of a network's logits.

    Args:
        log_weights: [G, K] log w.
        log_lik: [G, K] log-likelihood of each group, nats.
        logits: [G, K] of a `PosteriorNetwork`.
        temperature: None: resp = q, the whole expectation, without noise. A number: resp = softmax((logits + Gumbel
            noise) / temperature), whose pathwise gradient is that of the relaxed bound.
        generator: source of the noise.
    """
    log_q = torch.log_softmax(at_least_float32(logits), dim=-1)
    exact = posterior(log_weights.detach(), log_lik.detach()).log_resp
    gap = kl_to_gate(log_q.detach(), exact.to(log_q.dtype))
    if temperature is None:
        return AmortizedEStep(EStep(log_q.exp(), log_q), gap)
    noise = -torch.empty_like(log_q).exponential_(generator=generator).log()
    return AmortizedEStep(EStep(torch.softmax((log_q + noise) / temperature, dim=-1), log_q), gap)
