"""Label noise that is learnt, for all or for each annotator, under a Beta prior.

    p_ik = (1 - e_u) sigmoid(m_ik) + e_u sigmoid(-m_ik),   u = annotator of row i,   e_u ~ Beta(a, b) on [0, 1/2]

e = 1/2 is an annotator who answers at random. Beyond it labels would say the opposite of what they say, which is
another group of people, not noise. Source: Dawid & Skene 1979, with one error rate a person.

Legend: B comparisons, P features, G groups, K experts, S starts, U annotators.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.mixture.linear_em import WEIGHT_CONCENTRATION, ProbeData, fit_linear_em, log_prior, newton_step
from prefmix.mixture.posterior import group_log_lik, posterior
from prefmix.mixture.precision import at_least_float32
from prefmix.mixture.priors import map_log_weights

RANDOM = 0.5
# Strictly inside [0, 1/2]: a rate that had reached 0 would never leave it.
LOWEST, HIGHEST = 1e-4, RANDOM - 1e-4
FIRST_NOISE = 0.1


class BetaPrior(NamedTuple):
    """Beta(a, b) of an error rate; both at least 1, so that its mode exists.

    Attributes:
        a: 1 + pseudo-comparisons that were flipped.
        b: 1 + pseudo-comparisons that were not.
    """

    a: float = 1.2
    b: float = 2.8

    def checked(self) -> BetaPrior:
        """Itself; raises ValueError where EM would not raise evidence + log prior."""
        if not (self.a >= 1.0 and self.b >= 1.0):
            raise ValueError(
                f"noise prior Beta({self.a}, {self.b}): both must be at least 1 (1, 1 is flat). "
                "The default 1.2, 2.8 has its mode at 0.1 and is worth two comparisons."
            )
        return self

    def log_density(self, noise: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(a - 1) log e + (b - 1) log(1 - e), up to constants, nats."""
        return torch.xlogy(torch.as_tensor(self.a - 1.0, dtype=noise.dtype), noise) + (self.b - 1.0) * torch.log1p(
            -noise
        )


def noisy_log_lik(margins: Float[Tensor, "B K"], noise: Float[Tensor, "B"]) -> Float[Tensor, "B K"]:
    """log[(1 - e_i) sigmoid(m_ik) + e_i sigmoid(-m_ik)], nats; `preference_log_lik` with a rate for each row.

    Args:
        margins: [B, K] m_ik.
        noise: [B] e_i in [0, 0.5].
    """
    margins = at_least_float32(margins)
    rate = noise.to(margins.dtype).unsqueeze(-1)
    return torch.logaddexp(torch.log1p(-rate) + logsigmoid(margins), rate.log() + logsigmoid(-margins))


def flip_probability(margins: Float[Tensor, "B K"], noise: Float[Tensor, "B"]) -> Float[Tensor, "B K"]:
    """f_ik = e_i sigmoid(-m_ik) / p_ik: probability that label i was flipped, if expert k judged.

    Args:
        margins: [B, K] m_ik.
        noise: [B] e_i.

    Returns:
        [B, K] in [0, 1]; the E-step of the noise. Averaged over q_i it is the responsibility of "flipped".
    """
    margins = at_least_float32(margins)
    # The log odds of flipped: log e - log(1 - e) - m, exact at any margin.
    return torch.sigmoid(torch.logit(noise.to(margins.dtype)).unsqueeze(-1) - margins)


def row_flips(
    margins: Float[Tensor, "B K"],
    noise: Float[Tensor, "B"],
    resp: Float[Tensor, "B K"],
    label: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "B"]:
    """[B] f_i = sum_k q_ik f_ik; a soft label is the row both ways round, by its two shares.

    Args:
        margins: [B, K] m_ik.
        noise: [B] e_i.
        resp: [B, K] q_ik.
        label: [B] probability that the first response is the better one; None: 1.
    """
    flipped = flip_probability(margins, noise)
    if label is not None:
        share = label.to(flipped.dtype).unsqueeze(1)
        flipped = share * flipped + (1.0 - share) * flip_probability(-margins, noise)
    return (resp * flipped).sum(dim=1)


def update_noise(
    flipped: Float[Tensor, "B"],
    weight: Float[Tensor, "B"],
    annotator: Int[Tensor, "B"],
    num_annotators: int,
    prior: BetaPrior,
) -> Float[Tensor, "U"]:
    """The M-step: e_u = (sum_i a_i f_i + a - 1) / (sum_i a_i + a + b - 2), at most 1/2.

    The expected log-likelihood plus log prior is concave in e_u, so the clipped mode is its maximum on [0, 1/2].

    Args:
        flipped: [B] sum_k q_ik f_ik.
        weight: [B] a_i.
        annotator: [B] 0..U-1; all zeros for one rate of everybody.
        num_annotators: U.
        prior: Beta(a, b); annotators without rows get its mode.
    """
    counts = torch.stack([weight * flipped, weight], dim=1)
    flips, rows = group_log_lik(counts, annotator, num_annotators).unbind(dim=1)
    pseudo = prior.a + prior.b - 2.0
    total = rows + pseudo
    return torch.where(total > 0, (flips + prior.a - 1.0) / total.clamp_min(1e-30), 0.0).clamp(0.0, RANDOM)


class NoisyLinearEM(NamedTuple):
    """The best of S fits with learnt label noise.

    Attributes:
        log_resp: [G, K] log q_g.
        log_weights: [K] log w.
        coefficients: [K, P] c_k of the clean labels.
        noise: [U] e_u, MAP.
        log_evidence: sum_g log sum_k w_k prod_i p_ik, nats.
        penalised: log evidence + log prior of coefficients, weights and noise, constants left out.
        trace: [iterations] penalised evidence of this start before each M-step; it never falls.
    """

    log_resp: Float[Tensor, "G K"]
    log_weights: Float[Tensor, "K"]
    coefficients: Float[Tensor, "K P"]
    noise: Float[Tensor, "U"]
    log_evidence: float
    penalised: float
    trace: Float[Tensor, "iterations"]


def fit_noisy_linear_em(
    data: ProbeData,
    annotator: Int[Tensor, "B"],
    num_annotators: int,
    num_experts: int,
    ridge: float,
    *,
    prior: BetaPrior | None = None,
    restarts: int = 8,
    anneal: float = 4.0,
    generator: torch.Generator | None = None,
    max_steps: int = 200,
    tolerance: float = 1e-7,
) -> NoisyLinearEM:
    """Annealed EM without noise from several starts, then EM with it from each; the best penalised evidence is kept.

    Args:
        data: comparisons as feature differences.
        annotator: [B] who judged, 0..U-1; all zeros: one rate of everybody.
        num_annotators: U.
        num_experts: K.
        ridge: precision of the coefficients' Gaussian prior.
        prior: of the error rates.
        restarts: S.
        anneal: temperature at the start.
        generator: source of the starts; None seeds one with 0.
        max_steps: steps with noise, of each start.
        tolerance: relative gain of the penalised evidence at which a start has converged.
    """
    prior = (prior or BetaPrior()).checked()
    generator = generator or torch.Generator().manual_seed(0)
    starts = 1 if num_experts == 1 else restarts
    rows = data.difference.new_full((starts,), ridge)
    clean = fit_linear_em(data, num_experts, rows, anneal=anneal, generator=generator)
    fits = [
        _continue(data, annotator, num_annotators, weights, coefficients, ridge, prior, max_steps, tolerance)
        for weights, coefficients in zip(clean.log_weights, clean.coefficients, strict=True)
    ]
    return max(fits, key=lambda fit: fit.penalised)


def _continue(
    data: ProbeData,
    annotator: Int[Tensor, "B"],
    num_annotators: int,
    log_weights: Float[Tensor, "K"],
    coefficients: Float[Tensor, "K P"],
    ridge: float,
    prior: BetaPrior,
    max_steps: int,
    tolerance: float,
) -> NoisyLinearEM:
    filled = torch.bincount(data.group, minlength=data.num_groups) > 0
    noise = data.difference.new_full((num_annotators,), FIRST_NOISE)
    precision = data.difference.new_tensor([ridge])
    trace: list[Tensor] = []
    for _ in range(max_steps):
        margins, rate = data.difference @ coefficients.T, noise[annotator]
        grouped = group_log_lik(noisy_log_lik(margins, rate), data.group, data.num_groups, data.weight)
        log_resp, evidence = posterior(log_weights.expand(data.num_groups, -1), grouped)
        penalty = log_prior(log_weights[None], coefficients[None], precision)[0] + prior.log_density(noise).sum()
        trace.append(evidence.sum() + penalty)
        if len(trace) > 1 and bool(trace[-1] - trace[-2] <= tolerance * trace[-1].abs()):
            break
        resp, flip = log_resp.exp(), flip_probability(margins, rate)
        row_resp = resp[data.group]
        coefficients = _step(data, row_resp, flip, coefficients, precision)
        counts = resp[filled].sum(dim=0)
        log_weights = map_log_weights(counts, torch.full_like(counts, WEIGHT_CONCENTRATION))
        noise = update_noise((row_resp * flip).sum(dim=1), data.weight, annotator, num_annotators, prior)
    return NoisyLinearEM(
        log_resp, log_weights, coefficients, noise, float(evidence.sum()), float(trace[-1]), torch.stack(trace)
    )


def _step(
    data: ProbeData,
    row_resp: Float[Tensor, "B K"],
    flip: Float[Tensor, "B K"],
    coefficients: Float[Tensor, "K P"],
    ridge: Float[Tensor, "1"],
) -> Float[Tensor, "K P"]:
    """A Newton step on labels as they were meant: each row both ways round, by the probability that it was flipped."""
    both = ProbeData(
        torch.cat([data.difference, -data.difference]),
        torch.arange(2 * len(flip), device=flip.device),
        data.weight.repeat(2),
        2 * len(flip),
    )
    meant = torch.cat([row_resp * (1.0 - flip), row_resp * flip])
    return newton_step(both, meant[None], coefficients[None], ridge)[0]
