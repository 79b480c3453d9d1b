"""Which metadata say anything of a group: a prior for each field, as wide as the evidence makes it.

    log w_gk = log_softmax_k( offset_gk + b_k + sum_m W_km x_gm ),     W_km ~ N(0, 1 / lambda_f(m))

A flat prior learns every field, noise too, and a few dozen people are enough to be misled by. One width for all would
shrink what matters as strongly as what does not. Here every field f has its own precision lambda_f, at a maximum of
the marginal likelihood of the data, the groups' experts summed out (automatic relevance determination), and a field
without which the data are hardly less likely is left out: its weights are zero.

Source: MacKay 1992, "The evidence framework applied to classification networks"; Kass & Raftery 1995 for the scale of
Bayes factors. Legend: G groups, K experts, M features, F fields.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.lbfgs import maximise
from prefmix.mixture.posterior import posterior

MAX_ROUNDS = 50
# Rounds end where no precision moves by more than this share; a slower one is a flat maximum.
TOLERANCE = 0.05
# A standard deviation of 10 nats is no restriction, and weights of groups that fields part cleanly stay finite.
WIDEST = 0.01
# A field of whose weights the data decide less than this share says nothing.
UNDECIDED = 0.01
# Nats by which a field must make the data likelier: "positive" evidence. Noise alone passes zero one time in three.
POSITIVE = 1.0
# Of the intercept: three nats either way.
BIAS_PRECISION = 1 / 9


class GroupEvidence(NamedTuple):
    """What G groups bring.

    Attributes:
        features: [G, M] x, encoded metadata.
        offset: [G, K] what the gate's other terms say, logits.
        evidence: [G, K] log-likelihood e_gk of a group's comparisons under each expert, nats.
        times: [G] c_g, how often a group counts.
    """

    features: Float[Tensor, "G M"]
    offset: Float[Tensor, "G K"]
    evidence: Float[Tensor, "G K"]
    times: Float[Tensor, "G"]


class Relevance(NamedTuple):
    """A fitted metadata term.

    Attributes:
        weight: [K, M] W; zero where a field says nothing.
        bias: [K] b.
        precision: [F] lambda_f; infinite where a field says nothing.
    """

    weight: Float[Tensor, "K M"]
    bias: Float[Tensor, "K"]
    precision: Float[Tensor, "F"]


def fit_relevance(data: GroupEvidence, field: Int[Tensor, "M"]) -> Relevance:
    """Weights of a gate's metadata term and the precision of each field's prior, by turns.

    Given lambda, W and b maximise sum_g c_g log sum_k w_gk exp(e_gk) - sum_m lambda_f(m) |W_m|^2 / 2 - |b|^2 / 18.
    Given them, MacKay's fixed point of the marginal likelihood in Laplace's approximation, blocks [K, K] of a feature
    taken as independent: lambda_f = sum_m gamma_m / sum_m |W_m|^2, over the field's features, where gamma_m =
    tr H_m (H_m + lambda_f)^-1 counts the weights that the data decide, and H_m is the observed information
    sum_g c_g x_gm^2 [cov w_g - cov q_g], eigenvalues below zero as zero. Then the field that adds least to the marginal
    likelihood is taken out, if it adds less than `POSITIVE`, and the rest is fitted anew.

    Args:
        data: of all groups.
        field: [M] which of the F fields, 0..F-1, each feature belongs to.
    """
    data = GroupEvidence(*(part.detach().double().cpu() for part in data))
    field = field.cpu()
    start = torch.ones(int(field.max()) + 1, dtype=torch.float64)
    while True:
        fit, log_evidence = _fit(start, field, data)
        gains = {}
        for kept in torch.isfinite(fit.precision).nonzero().flatten().tolist():
            without = fit.precision.clone()
            without[kept] = torch.inf
            gains[kept] = log_evidence - _log_evidence(most_probable(without, field, data, start=fit), field, data)
        if not gains or min(gains.values()) >= POSITIVE:
            return fit
        start = fit.precision.clone()
        start[min(gains, key=lambda kept: gains[kept])] = torch.inf


def _fit(precision: Float[Tensor, "F"], field: Int[Tensor, "M"], data: GroupEvidence) -> tuple[Relevance, float]:
    """Weights and precisions by turns, and their log marginal likelihood; fields of infinite precision stay out."""
    fit = most_probable(precision, field, data)
    for _ in range(MAX_ROUNDS):
        found = _next_precision(fit, field, data)
        kept = torch.isfinite(fit.precision)
        fit = most_probable(found, field, data, start=fit)
        if not bool(((found.log() - precision.log()).abs() > TOLERANCE)[kept].any()):
            break
        precision = found
    return fit, _log_evidence(fit, field, data)


def most_probable(
    precision: Float[Tensor, "F"], field: Int[Tensor, "M"], data: GroupEvidence, start: Relevance | None = None
) -> Relevance:
    """W and b at the maximum of the penalised log-likelihood, the fields' precisions given.

    Args:
        precision: [F] lambda_f; infinite: the field is left out.
        field: [M] which field each feature belongs to.
        data: of all groups, float64.
        start: where to start, instead of zero.
    """
    num_experts = data.offset.shape[1]
    kept = torch.isfinite(precision)[field]
    weight = torch.zeros(num_experts, len(field), dtype=torch.float64) if start is None else start.weight.clone()
    bias = torch.zeros(num_experts, dtype=torch.float64) if start is None else start.bias.clone()
    weight.requires_grad_()
    bias.requires_grad_()
    finite = torch.where(kept, precision[field], 0.0)

    def objective() -> Tensor:
        fit = Relevance(torch.where(kept, weight, 0.0), bias, precision)
        prior = (finite * fit.weight.square()).sum() / 2 + BIAS_PRECISION * bias.square().sum() / 2
        return (data.times * posterior(_log_weights(fit, data), data.evidence).log_evidence).sum() - prior

    scale = max(float(data.times.sum()), 1.0)
    maximise(objective, [weight, bias], max_steps=200, scale=scale, tolerance_change=1e-9)
    return Relevance(torch.where(kept, weight.detach(), 0.0), bias.detach(), precision)


def _next_precision(fit: Relevance, field: Int[Tensor, "M"], data: GroupEvidence) -> Float[Tensor, "F"]:
    """[F] lambda_f of the next round; infinite where the data decide nothing of a field's weights."""
    values = _information(fit, data)
    decided = (values / (values + fit.precision[field].unsqueeze(1))).sum(1)
    by_field = torch.zeros_like(fit.precision)
    gamma = by_field.index_add(0, field, decided)
    size = by_field.index_add(0, field, fit.weight.square().sum(0))
    most = by_field.index_add(0, field, torch.full_like(decided, len(fit.bias) - 1.0))
    found = (gamma / size.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(WIDEST)
    return torch.where(gamma > UNDECIDED * most, found, torch.inf)


def _log_evidence(fit: Relevance, field: Int[Tensor, "M"], data: GroupEvidence) -> float:
    """Log marginal likelihood of the data, W integrated out by Laplace's approximation, up to a constant, nats.

    sum_g c_g log sum_k w_gk exp(e_gk) - sum_m [ lambda_f |W_m|^2 + log det(1 + H_m / lambda_f) ] / 2
    """
    precision = fit.precision[field]
    kept = torch.isfinite(precision)
    likelihood = (data.times * posterior(_log_weights(fit, data), data.evidence).log_evidence).sum()
    size = (precision * fit.weight.square().sum(0))[kept].sum() + BIAS_PRECISION * fit.bias.square().sum()
    volume = torch.log1p(_information(fit, data) / precision.unsqueeze(1))[kept].sum()
    return float(likelihood - (size + volume) / 2)


def _information(fit: Relevance, data: GroupEvidence) -> Float[Tensor, "M K"]:
    """Eigenvalues of H_m, those below zero as zero."""
    log_weights = _log_weights(fit, data)
    resp = posterior(log_weights, data.evidence).log_resp.exp()
    observed = _covariance(log_weights.exp()) - _covariance(resp)
    information = torch.einsum("g,gm,gkj->mkj", data.times, data.features.square(), observed)
    return torch.linalg.eigvalsh(information).clamp_min(0)


def _log_weights(fit: Relevance, data: GroupEvidence) -> Float[Tensor, "G K"]:
    return torch.log_softmax(data.offset + fit.bias + data.features @ fit.weight.T, dim=1)


def _covariance(probabilities: Float[Tensor, "G K"]) -> Float[Tensor, "G K K"]:
    """[G, K, K] of a one-hot draw: diag(p) - p p^T."""
    return torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
