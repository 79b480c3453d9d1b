"""Which metadata say anything of a group: a prior for each field, as wide as the evidence makes it.

    log w_gk = log_softmax_k( offset_gk + b_k + sum_m W_km x_gm ),     W_km ~ N(0, 1 / lambda_f(m))

A flat prior learns every field, noise too, and a few dozen people are enough to be misled by. One width for all would
shrink what matters as strongly as what does not. Here every field f has its own precision lambda_f, at a maximum of
the marginal likelihood of the data, the groups' experts summed out (automatic relevance determination): a field that
says nothing gets a prior of width zero, and weights of zero.

Source: MacKay 1992, "The evidence framework applied to classification networks"; Tipping 2001 for the field's pruning.
Legend: G groups, K experts, M features, F fields.
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
TOLERANCE = 0.01
# A standard deviation of 10 nats is no restriction, and weights of groups that fields part cleanly stay finite.
WIDEST = 0.01
# A field of whose weights the data decide less than this share says nothing.
IRRELEVANT = 0.01
# Of the intercept: three nats either way.
BIAS_PRECISION = 1 / 9


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


def fit_relevance(
    features: Float[Tensor, "G M"],
    field: Int[Tensor, "M"],
    offset: Float[Tensor, "G K"],
    evidence: Float[Tensor, "G K"],
    count: Float[Tensor, "G"],
) -> Relevance:
    """Weights of a gate's metadata term and the precision of each field's prior, by turns.

    Given lambda, W and b maximise sum_g c_g log sum_k w_gk exp(e_gk) - sum_m lambda_f(m) |W_m|^2 / 2 - |b|^2 / 18.
    Given them, MacKay's fixed point of the marginal likelihood in Laplace's approximation, blocks [K, K] of a feature
    taken as independent: lambda_f = sum_m gamma_m / sum_m |W_m|^2, over the field's features, where gamma_m =
    tr H_m (H_m + lambda_f)^-1 counts the weights that the data decide, and H_m is the observed information
    sum_g c_g x_gm^2 [cov w_g - cov q_g], eigenvalues below zero as zero.

    Args:
        features: [G, M] x.
        field: [M] which of the F fields, 0..F-1, each feature belongs to.
        offset: [G, K] what the gate's other terms say, logits.
        evidence: [G, K] log-likelihood e_gk of a group's comparisons under each expert, nats.
        count: [G] c_g, how often a group counts.
    """
    x, offset, evidence, count = (part.detach().double().cpu() for part in (features, offset, evidence, count))
    field = field.cpu()
    num_fields = int(field.max()) + 1
    weight = torch.zeros(offset.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(offset.shape[1], dtype=torch.float64, requires_grad=True)
    precision = torch.ones(num_fields, dtype=torch.float64)
    for _ in range(MAX_ROUNDS):
        _most_probable(weight, bias, precision[field], (x, offset, evidence, count))
        found = _precisions(weight, bias, precision, field, (x, offset, evidence, count))
        moving = (found.log() - precision.log()).abs() > TOLERANCE
        moving &= torch.isfinite(precision)
        precision = torch.where(torch.isfinite(precision), found, precision)
        if not bool(moving.any()):
            break
    kept = torch.isfinite(precision)[field]
    return Relevance(torch.where(kept, weight.detach(), 0.0), bias.detach(), precision)


_Data = tuple[Tensor, Tensor, Tensor, Tensor]


def _most_probable(weight: Tensor, bias: Tensor, precision: Float[Tensor, "M"], data: _Data) -> None:
    """Moves W and b in place to the maximum of the penalised log-likelihood; pruned features to zero."""
    _, _, evidence, count = data
    kept = torch.isfinite(precision)
    finite = torch.where(kept, precision, 0.0)
    with torch.no_grad():
        weight[:, ~kept] = 0.0

    def objective() -> Tensor:
        log_weights = _log_weights(torch.where(kept, weight, 0.0), bias, data)
        prior = -(finite * weight.square()).sum() / 2 - BIAS_PRECISION * bias.square().sum() / 2
        return (count * posterior(log_weights, evidence).log_evidence).sum() + prior

    maximise(objective, [weight, bias], max_steps=200, scale=max(float(count.sum()), 1.0), tolerance_change=1e-12)


@torch.no_grad()
def _precisions(
    weight: Tensor, bias: Tensor, precision: Float[Tensor, "F"], field: Int[Tensor, "M"], data: _Data
) -> Float[Tensor, "F"]:
    """[F] lambda_f of the next round; infinite where the data decide nothing of a field's weights."""
    x, _, evidence, count = data
    log_weights = _log_weights(weight, bias, data)
    missing = _covariance(log_weights.exp()) - _covariance(posterior(log_weights, evidence).log_resp.exp())
    information = torch.einsum("g,gm,gkj->mkj", count, x.square(), missing)
    values = torch.linalg.eigvalsh(information).clamp_min(0)
    decided = (values / (values + precision[field].unsqueeze(1))).sum(1)
    by_field = torch.zeros(len(precision), dtype=torch.float64)
    gamma = by_field.index_add(0, field, decided)
    size = by_field.index_add(0, field, weight.square().sum(0))
    most = by_field.index_add(0, field, torch.full_like(decided, weight.shape[0] - 1.0))
    found = (gamma / size.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(WIDEST)
    return torch.where(gamma > IRRELEVANT * most, found, torch.inf)


def _log_weights(weight: Tensor, bias: Tensor, data: _Data) -> Float[Tensor, "G K"]:
    x, offset, _, _ = data
    return torch.log_softmax(offset + bias + x @ weight.T, dim=1)


def _covariance(probabilities: Float[Tensor, "G K"]) -> Float[Tensor, "G K K"]:
    """[G, K, K] of a one-hot draw: diag(p) - p p^T."""
    return torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
