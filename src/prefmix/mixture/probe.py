"""The probe: a user-level mixture of linear Bradley-Terry rewards, fitted in seconds by annealed EM.

    r_k(y) = c_k . f(y),   p(y_w > y_l | z = k) = sigmoid(c_k . [f(y_w) - f(y_l)]),   one z per group

It finds the groups before a single expert is trained: experts that can memorise confirm their own first guesses, a
linear reward under a ridge cannot. Its answer is the diagnosis, the first responsibilities, and a baseline that the
experts must beat. Source: method section 3b; Ueda & Nakano 1998 for the annealing. The ridge is chosen
on held-out training rows.

Legend: N texts, P features, B comparisons, G groups, K experts, S starts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.alignment import align
from prefmix.mixture.bradley_terry import mixture_log_lik, preference_log_lik
from prefmix.mixture.held_out import Gain, paired_gain
from prefmix.mixture.linear_em import WEIGHT_CONCENTRATION, LinearEM, ProbeData, fit_linear_em
from prefmix.mixture.posterior import group_log_lik, posterior
from prefmix.mixture.precision import at_least_float32
from prefmix.mixture.spectral import sign_matrix, spectral_resp, summed_differences
from prefmix.mixture.split_merge import split_and_merge

RIDGE_GRID = (1.0, 4.0, 16.0, 64.0, 256.0)
POOLING_GRID = (0.0, 16.0, 64.0, 256.0, 1024.0)
FOLDS = 4
MIN_GROUPS_TO_HOLD_OUT = 20
MAX_RIDGE_ROWS = 6_000
RIDGE_STARTS = 2


class ProbeResult(NamedTuple):
    """The best of several starts.

    Attributes:
        log_resp: [G, K] log q_g; the weights themselves for groups without comparisons.
        log_weights: [K] log w, smoothed by the Dirichlet prior, experts by falling weight.
        coefficients: [K, P] linear rewards, nats for a unit of feature.
        log_evidence: sum_g log sum_k w_k prod_i p_ik, nats.
        penalised: log evidence + log prior of coefficients and weights; what chose the start.
        restart_evidences: [S] penalised evidence of every start; the best one's is `penalised` unless split and merge
            improved on it.
        restart_log_resp: [S, G, K] responsibilities of every start, experts in the order of the best
            (`alignment.align`): their agreement is a diagnosis.
        ridge: the precision of the coefficients' prior that was used.
        pooling: the precision that drew them to their mean, on top of it.
        held_out: [G] log-probability of each group's held-out rows at the ridge that was chosen by it, nats; 0 for
            groups that were not asked, None where the ridge was given.
    """

    log_resp: Float[Tensor, "G K"]
    log_weights: Float[Tensor, "K"]
    coefficients: Float[Tensor, "K P"]
    log_evidence: float
    penalised: float
    restart_evidences: Float[Tensor, "S"]
    restart_log_resp: Float[Tensor, "S G K"]
    ridge: float
    pooling: float = 0.0
    held_out: Float[Tensor, "G"] | None = None


def fit_probe(
    features: Float[Tensor, "N P"],
    chosen: Int[Tensor, "B"],
    rejected: Int[Tensor, "B"],
    group: Int[Tensor, "B"],
    num_groups: int,
    num_experts: int,
    *,
    weight: Float[Tensor, "B"] | None = None,
    restarts: int = 8,
    ridge: float | None = None,
    pooling: float | None = 0.0,
    anneal: float = 4.0,
    weight_concentration: float = WEIGHT_CONCENTRATION,
    generator: torch.Generator | None = None,
) -> ProbeResult:
    """Fits the mixture from several starts, keeps the best, and tries to improve it by splitting and merging.

    From three starts on, the last is spectral over the groups' summed differences, and the one before it over the
    sign matrix where groups share pairs of texts; the others are random.

    Args:
        features: [N, P] standardised features of the texts (`features.pool_features`).
        chosen: [B] index of the preferred text.
        rejected: [B] index of the other text.
        group: [B] latent group of each comparison, 0..G-1.
        num_groups: G.
        num_experts: K, at least 1.
        weight: [B] row weights inside the group's likelihood; None for ones.
        restarts: S, number of starts.
        ridge: precision of the Gaussian prior of the coefficients; None chooses it on held-out rows.
        pooling: precision that draws experts to their mean, on top of the ridge (`linear_em`): for groups of few
            rows that share most of what they want. 0: none; None chooses it on held-out rows, after the ridge.
        anneal: temperature of the responsibilities at the start; 1 is plain EM.
        weight_concentration: a >= 1, Dirichlet balance prior of the weights; 1 is flat.
        generator: source of the starts; None seeds one with 0.

    Returns:
        ProbeResult in float32.
    """
    generator = generator or torch.Generator().manual_seed(0)
    data = _probe_data(features, chosen, rejected, group, num_groups, weight)
    held_out = None
    if ridge is None:
        found = _cross_validated(data, num_experts, torch.tensor(RIDGE_GRID), None, anneal, generator, RIDGE_STARTS)
        ridge, held_out = RIDGE_GRID[found.best], found.of_group[found.best]
    if pooling is None:
        pooling = choose_pooling(data, num_experts, ridge, anneal=anneal, generator=generator)
    starts = 1 if num_experts == 1 else restarts
    signs = sign_matrix(chosen, rejected, group, num_groups, weight)
    fit = fit_linear_em(
        data, num_experts, torch.full((starts,), ridge), anneal=anneal, generator=generator,
        weight_concentration=weight_concentration, first_resp=_first_resp(data, signs, starts, num_experts),
        pooling=torch.full((starts,), pooling) if pooling else None,
    )  # fmt: skip
    best = split_and_merge(data, fit, ridge, weight_concentration=weight_concentration, pooling=pooling or None)
    return _result(best, fit, ridge, pooling)._replace(held_out=held_out)


def gain_over_one(
    result: ProbeResult,
    features: Float[Tensor, "N P"],
    chosen: Int[Tensor, "B"],
    rejected: Int[Tensor, "B"],
    group: Int[Tensor, "B"],
    *,
    weight: Float[Tensor, "B"] | None = None,
    generator: torch.Generator,
) -> Gain:
    """By how much held-out groups are predicted better by the probe's K rewards than by one, nats a group.

    One reward is cross-validated on the folds on which the K were, each at its best ridge there: a fit of a second
    beside the probe's own. The group is the unit of sampling.

    Args:
        result: of the same rows, its ridge chosen.
        features: [N, P] as the probe had them.
        chosen: [B] index of the preferred text.
        rejected: [B] index of the other text.
        group: [B] latent group of each comparison.
        weight: [B] row weights.
        generator: seeded as the one that `fit_probe` was given, which makes the folds the same.
    """
    assert result.held_out is not None, "the probe chose its ridge"
    data = _probe_data(features, chosen, rejected, group, len(result.held_out), weight)
    one = _cross_validated(data, 1, torch.tensor(RIDGE_GRID), None, 1.0, generator, 1)
    asked = result.held_out != 0
    return paired_gain(-one.of_group[one.best][asked], -result.held_out[asked], torch.arange(int(asked.sum())))


def probe_predict(
    features: Float[Tensor, "N P"],
    chosen: Int[Tensor, "B"],
    rejected: Int[Tensor, "B"],
    coefficients: Float[Tensor, "K P"],
    log_weights: Float[Tensor, "B K"],
) -> Float[Tensor, "B"]:
    """Probability that the chosen text wins: sum_k w_k sigmoid(c_k . d).

    Args:
        features: [N, P] features of the texts, by the projector of the training texts.
        chosen: [B] index of the preferred text.
        rejected: [B] index of the other text.
        coefficients: [K, P] of a `ProbeResult`.
        log_weights: [B, K] log w of each row: the probe's weights for the population; for a user whose *other*
            comparisons are known, their `posterior` from `probe_log_lik`.
    """
    log_lik = probe_log_lik(features, chosen, rejected, coefficients)
    return mixture_log_lik(log_weights, log_lik).exp()


def probe_log_lik(
    features: Float[Tensor, "N P"],
    chosen: Int[Tensor, "B"],
    rejected: Int[Tensor, "B"],
    coefficients: Float[Tensor, "K P"],
) -> Float[Tensor, "B K"]:
    """Log p_ik of every comparison under every linear reward, nats."""
    features = at_least_float32(features)
    return preference_log_lik((features[chosen] - features[rejected]) @ coefficients.to(features.dtype).T)


def choose_ridge(
    data: ProbeData,
    num_experts: int,
    *,
    anneal: float,
    generator: torch.Generator,
    grid: tuple[float, ...] = RIDGE_GRID,
    starts: int = RIDGE_STARTS,
) -> float:
    """The ridge with the best held-out evidence, by cross-validation over groups (over rows, where groups are few).

    A held-out user is scored as a whole, log sum_k w_k prod_i p_ik: what tells tastes apart is how a user's rows hang
    together, and with two rows a user, holding out one of them would leave nothing of that to learn from. The mixture
    itself is fitted, not one linear reward: where groups are opposed, one reward explains nothing at any ridge and
    would choose the largest. Only training rows are used.
    """
    ridges = torch.tensor(grid)
    return grid[_cross_validated(data, num_experts, ridges, None, anneal, generator, starts).best]


def choose_pooling(
    data: ProbeData,
    num_experts: int,
    ridge: float,
    *,
    anneal: float,
    generator: torch.Generator,
    grid: tuple[float, ...] = POOLING_GRID,
    starts: int = 2,
) -> float:
    """The pooling of best held-out evidence at a given ridge, as `choose_ridge` chooses that; of equals the least.

    With one expert there is nothing to pool, and the answer is 0.
    """
    if num_experts == 1:
        return 0.0
    ridges, poolings = torch.full((len(grid),), ridge), torch.tensor(grid)
    return grid[_cross_validated(data, num_experts, ridges, poolings, anneal, generator, starts).best]


class _HeldOut(NamedTuple):
    """Evidence of C priors on held-out rows.

    Attributes:
        of_group: [C, G] log-probability of each group's rows, summed over folds, nats.
        best: the prior of the largest sum over groups.
    """

    of_group: Float[Tensor, "C G"]
    best: int


def _cross_validated(
    data: ProbeData,
    num_experts: int,
    ridges: Float[Tensor, "C"],
    poolings: Float[Tensor, "C"] | None,
    anneal: float,
    generator: torch.Generator,
    starts: int,
) -> _HeldOut:
    """Held-out evidence of C priors; each with the best of `starts` starts."""
    data = _sample_groups(data, generator)
    fold = _fold_of_rows(data, generator)
    score, of_group = torch.zeros(len(ridges)), torch.zeros(len(ridges), data.num_groups, dtype=torch.float64)
    ridge = ridges.repeat_interleave(starts)
    pooling = None if poolings is None else poolings.repeat_interleave(starts)
    for held_out in range(FOLDS):
        train, test = data.select(fold != held_out), data.select(fold == held_out)
        if len(test.group) == 0 or len(train.group) == 0:
            continue
        fit = fit_linear_em(train, num_experts, ridge, anneal=anneal, generator=generator, pooling=pooling)
        best = fit.penalised.view(len(ridges), starts).argmax(dim=1) + torch.arange(len(ridges)) * starts
        found = _held_out_evidence(fit, best, test)
        score += found.sum(dim=1).float()
        of_group += found
    return _HeldOut(of_group, int(score.argmax()))


def _held_out_evidence(fit: LinearEM, start: Int[Tensor, "C"], test: ProbeData) -> Float[Tensor, "C G"]:
    """Log-probability of each group's test rows, given what the fit knows of the group (w if nothing)."""
    scores = []
    for s in start.tolist():
        log_lik = preference_log_lik(test.difference @ fit.coefficients[s].T)
        grouped = group_log_lik(log_lik, test.group, test.num_groups, test.weight)
        scores.append(posterior(fit.log_resp[s], grouped).log_evidence.double())
    return torch.stack(scores)


def _sample_groups(data: ProbeData, generator: torch.Generator) -> ProbeData:
    """Random groups with about MAX_RIDGE_ROWS rows together: the best ridge of a prior does not need all of them."""
    order = torch.randperm(data.num_groups, generator=generator)
    rows_before = torch.bincount(data.group, minlength=data.num_groups)[order].cumsum(0)
    kept = order[: int((rows_before < MAX_RIDGE_ROWS).sum()) + 1]
    return data.select(torch.isin(data.group, kept))


def _fold_of_rows(data: ProbeData, generator: torch.Generator) -> Int[Tensor, "B"]:
    """[B] 0..FOLDS-1: whole groups, or with few groups the shuffled rows of each in turn."""
    groups = torch.unique(data.group)
    if len(groups) >= MIN_GROUPS_TO_HOLD_OUT:
        by_group = torch.zeros(data.num_groups, dtype=torch.int64)
        by_group[groups[torch.randperm(len(groups), generator=generator)]] = torch.arange(len(groups)) % FOLDS
        return by_group[data.group]
    shuffled = torch.randperm(len(data.group), generator=generator)
    rows = shuffled[torch.argsort(data.group[shuffled], stable=True)]
    fold = torch.empty_like(data.group)
    fold[rows] = torch.arange(len(rows)) % FOLDS
    return fold


def _probe_data(
    features: Float[Tensor, "N P"],
    chosen: Int[Tensor, "B"],
    rejected: Int[Tensor, "B"],
    group: Int[Tensor, "B"],
    num_groups: int,
    weight: Float[Tensor, "B"] | None,
) -> ProbeData:
    features = at_least_float32(features)
    if len(chosen) == 0:
        raise ValueError("the probe got no comparisons: give at least one training row.")
    if not torch.isfinite(features).all():
        raise ValueError("the probe's features hold NaN or Inf: check the trunk states of the training texts.")
    row_weight = torch.ones(len(chosen)) if weight is None else weight
    return ProbeData(features[chosen] - features[rejected], group, row_weight.to(features.dtype), num_groups)


def _first_resp(data: ProbeData, signs: Float[Tensor, "G Q"], starts: int, num_experts: int) -> Float[Tensor, "S G K"]:
    """NaN for random starts, and the spectral ones last."""
    resp = data.difference.new_full((starts, data.num_groups, num_experts), torch.nan)
    if starts < 3:
        return resp
    generator = torch.Generator().manual_seed(0)
    resp[-1] = spectral_resp(summed_differences(data), num_experts, generator)
    if signs.shape[1] >= num_experts:
        resp[-2] = spectral_resp(signs, num_experts, generator)
    return resp


def _result(best: LinearEM, fit: LinearEM, ridge: float, pooling: float) -> ProbeResult:
    """The best start with its experts sorted by weight, and the others aligned to it."""
    order = best.log_weights[0].argsort(descending=True, stable=True)
    log_resp = best.log_resp[0][:, order]
    return ProbeResult(
        log_resp=log_resp,
        log_weights=best.log_weights[0][order],
        coefficients=best.coefficients[0][order],
        log_evidence=float(best.log_evidence[0]),
        penalised=float(best.penalised[0]),
        restart_evidences=fit.penalised,
        restart_log_resp=align(fit.log_resp, log_resp).log_resp,
        ridge=ridge,
        pooling=pooling,
    )
