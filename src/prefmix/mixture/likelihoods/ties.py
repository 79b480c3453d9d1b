"""Comparisons that may end in a tie: Davidson and Rao-Kupper. Legend: B comparisons, K experts.

Both are Bradley-Terry with one more parameter; with it at zero a tie is impossible and the rest is Bradley-Terry.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.mixture.precision import at_least_float32


class Outcomes(NamedTuple):
    """Log-probabilities of the three outcomes of a comparison, nats; exp of them sums to 1.

    Attributes:
        win: [B, K] log p_k(first > second).
        tie: [B, K] log p_k(first = second); -inf where the model allows no ties.
        loss: [B, K] log p_k(second > first).
    """

    win: Float[Tensor, "B K"]
    tie: Float[Tensor, "B K"]
    loss: Float[Tensor, "B K"]


def davidson(margins: Float[Tensor, "B K"], tie_strength: float) -> Outcomes:
    """Ties as often as the geometric mean of both sides, times nu.

        p(win) = e^(m/2) / Z,   p(tie) = nu / Z,   p(loss) = e^(-m/2) / Z,   Z = e^(m/2) + e^(-m/2) + nu

    Args:
        margins: [B, K] m = r(first) - r(second), nats.
        tie_strength: nu >= 0. Equal rewards tie with probability nu / (2 + nu): nu = 2t / (1 - t) for a share t.

    Returns:
        Outcomes; finite with finite gradients at margins of +-1e4 (for nu > 0).

    Source: Davidson 1970, equation 2.4, with rewards as log strengths.
    """
    _check(tie_strength)
    half = at_least_float32(margins) / 2
    log_nu = torch.full_like(half, math.log(tie_strength) if tie_strength else -math.inf)
    normaliser = torch.logsumexp(torch.stack([half, log_nu, -half]), dim=0)
    return Outcomes(half - normaliser, log_nu - normaliser, -half - normaliser)


def rao_kupper(margins: Float[Tensor, "B K"], tie_strength: float) -> Outcomes:
    """A judge who sees a difference only beyond a threshold eta.

        p(win) = sigmoid(m - eta),   p(loss) = sigmoid(-m - eta),   p(tie) = (e^(2 eta) - 1) p(win) p(loss)

    Args:
        margins: [B, K] m = r(first) - r(second), nats.
        tie_strength: eta >= 0, nats. Equal rewards tie with probability tanh(eta / 2).

    Returns:
        Outcomes; finite with finite gradients at margins of +-1e4 (for eta > 0).

    Source: Rao & Kupper 1967, with theta = e^eta.
    """
    _check(tie_strength)
    margins = at_least_float32(margins)
    win, loss = logsigmoid(margins - tie_strength), logsigmoid(-margins - tie_strength)
    # log(e^(2 eta) - 1) = 2 eta + log(1 - e^(-2 eta)), which does not overflow
    log_odds = 2 * tie_strength + math.log(-math.expm1(-2 * tie_strength)) if tie_strength else -math.inf
    return Outcomes(win, log_odds + win + loss, loss)


TIES = {"davidson": davidson, "rao_kupper": rao_kupper}


def _check(tie_strength: float) -> None:
    if not 0.0 <= tie_strength < math.inf:
        raise ValueError(
            f"tie_strength is {tie_strength}, but it must be at least 0 and finite. "
            "0 allows no ties; 1 is a good start where a third of equal responses are called equal."
        )
