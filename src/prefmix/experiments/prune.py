"""Overspecify and prune: from too many experts downwards, merging the pair whose merger costs least.

Legend: B comparisons, G groups (users), K experts, P features, C pairs of experts.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.experiments.effective_parameters import effective_parameters
from prefmix.mixture.linear_em import WEIGHT_CONCENTRATION, LinearEM, ProbeData, expectation, log_prior, newton_step
from prefmix.mixture.priors import map_log_weights

STEPS = 8


def prune(data: ProbeData, fit: LinearEM, ridge: float, steps: int = STEPS) -> int:
    """The number of experts where a path of mergers has its best BIC.

    Every pair is merged on trial (its groups together, `steps` of EM for all experts), and the merger with the best
    penalised evidence is kept, down to one expert. Starting from too many experts finds groups that a direct fit with
    few starts can miss; the path only says how many.

    Args:
        data: the comparisons.
        fit: its first start has the largest K.
        ridge: precision of the coefficients' prior.
        steps: EM steps after each merger.

    Relations: BIC as in `choose_k.Candidate`.
    """
    resp, coefficients, evidence = fit.log_resp[0].exp(), fit.coefficients[0], float(fit.log_evidence[0])
    num_users = int((torch.bincount(data.group, minlength=data.num_groups) > 0).sum())
    scores = {}
    while True:
        parameters = effective_parameters(data, resp, coefficients, ridge)
        scores[len(coefficients)] = evidence - 0.5 * parameters * math.log(num_users)
        if len(coefficients) == 1:
            return max(scores, key=lambda k: scores[k])
        resp, coefficients, evidence = _merge_best(data, resp, coefficients, ridge, steps)


def _merge_best(
    data: ProbeData, resp: Float[Tensor, "G K"], coefficients: Float[Tensor, "K P"], ridge: float, steps: int
) -> tuple[Float[Tensor, "G J"], Float[Tensor, "J P"], float]:
    """K - 1 experts: all pairs are tried at once, as starts of one batch."""
    pairs = list(combinations(range(len(coefficients)), 2))
    resp_CGJ = torch.stack([_merged(resp.T, resp.T, j, k).T for j, k in pairs])
    usage = resp.sum(dim=0)
    weighted = coefficients * usage.unsqueeze(1)
    tastes = [_merged(weighted, coefficients, j, k) for j, k in pairs]
    for taste, (j, k) in zip(tastes, pairs):
        taste[-1] /= usage[j] + usage[k]
    coefficients_CJP = torch.stack(tastes)
    ridges = data.difference.new_full((len(pairs),), ridge)
    filled = torch.bincount(data.group, minlength=data.num_groups) > 0
    concentration = resp.new_full((resp_CGJ.shape[2],), WEIGHT_CONCENTRATION)
    for _ in range(steps):
        coefficients_CJP = newton_step(data, resp_CGJ, coefficients_CJP, ridges)
        log_weights = map_log_weights(resp_CGJ[:, filled].sum(dim=1), concentration)
        log_resp, evidence = expectation(data, log_weights, coefficients_CJP)
        resp_CGJ = log_resp.exp()
    best = int((evidence + log_prior(log_weights, coefficients_CJP, ridges)).argmax())
    return resp_CGJ[best], coefficients_CJP[best], float(evidence[best])


def _merged(summed: Float[Tensor, "K N"], kept: Float[Tensor, "K N"], j: int, k: int) -> Float[Tensor, "J N"]:
    """Rows of `kept` without j and k, and the sum of those two rows of `summed` as the last."""
    others = [i for i in range(len(kept)) if i not in (j, k)]
    return torch.cat([kept[others], (summed[j] + summed[k]).unsqueeze(0)])
