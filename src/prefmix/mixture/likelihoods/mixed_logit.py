"""A distribution over beta: how strongly people express one and the same preference (mixed logit).

Legend: B rows, K experts, Q nodes.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.precision import at_least_float32

# The integrand is a sigmoid of e^x: at a spread of 2 and 32 nodes the error is below 1e-4 nats (the tests integrate).
NODES = 32
SPREADS = tuple(np.linspace(0.0, 2.0, 41).tolist())


class Nodes(NamedTuple):
    """Gauss-Hermite quadrature of a standard normal: E f(x) = sum_q w_q f(x_q).

    Attributes:
        place: [Q] x_q.
        log_weight: [Q] log w_q.
    """

    place: Float[np.ndarray, "Q"]
    log_weight: Float[np.ndarray, "Q"]


@cache
def normal_nodes(num: int = NODES) -> Nodes:
    """The nodes, exact for polynomials of degree 2 `num` - 1."""
    place, weight = np.polynomial.hermite_e.hermegauss(num)
    return Nodes(place, np.log(weight / weight.sum()))


def mixed_logit_log_lik(
    margins: Float[Tensor, "B K"], spread: float, label_noise: float = 0.0, num_nodes: int = NODES
) -> Float[Tensor, "B K"]:
    """Log-probability of the observed preference where beta is log-normal, its mean the beta of the margins.

        log p_k = log E_x sigmoid(m_k e^(s x - s^2 / 2)),   x ~ N(0, 1)

    With the mean held, and not the median, the spread is no scale in disguise: near m = 0 it changes nothing.

    A proper likelihood: p(m) + p(-m) = 1. Its sign is that of the margin, so it ranks as one beta does and differs in
    how sure it is: tails are heavier, and rows against a large margin pull less.

    Args:
        margins: [B, K] m_k at the mean beta, nats.
        spread: s >= 0, standard deviation of log beta; 0 is Bradley-Terry.
        label_noise: e of `preference_log_lik`, inside the mean.
        num_nodes: Q of the quadrature.

    Source: Imai et al. 2026 (arXiv 2601.06180), log-normal case, by quadrature where the paper draws 16 samples.
    Relations: experts that share everything but beta are the same model with a discrete distribution.
    """
    if spread < 0:
        raise ValueError(f"beta_spread is {spread}, but it is a standard deviation: give zero or more")
    if spread == 0:
        return preference_log_lik(margins, label_noise)
    nodes = normal_nodes(num_nodes)
    margins = at_least_float32(margins)
    scale = torch.from_numpy(np.exp(spread * nodes.place - 0.5 * spread**2)).to(margins)
    log_weight = torch.from_numpy(nodes.log_weight).to(margins)
    scaled = (margins.unsqueeze(-1) * scale).flatten(1)
    log_lik = preference_log_lik(scaled, label_noise).view(*margins.shape, num_nodes)
    return torch.logsumexp(log_lik + log_weight, dim=-1)


def best_spread(
    margins: Float[Tensor, "B K"], weight: Float[Tensor, "B"], candidates: tuple[float, ...] = SPREADS
) -> float:
    """The spread with the largest likelihood at these margins, among candidates (the smallest of equals).

    Args:
        margins: [B, K] of the training rows under the experts as they are.
        weight: [B] row weights.
        candidates: spreads to look at, rising.
    """
    rows = weight.double().unsqueeze(1)
    scores = [float((rows * mixed_logit_log_lik(margins.double(), spread)).sum()) for spread in candidates]
    return candidates[int(np.argmax(scores))]
