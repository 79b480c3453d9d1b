"""The error rate of one more annotator, the experts given: what `mixture.annotator_noise` learns in training.

    maximise over e in [0, 1/2]:   log evidence(e) + (a - 1) log e + (b - 1) log(1 - e)
    p_ik(e) = (1 - e) sigmoid(m_ik) + e sigmoid(-m_ik),   e ~ Beta(a, b)

EM alternates q_ik, the posterior over experts at the present e, and e = (sum_i a_i sum_k q_ik f_ik + a - 1) /
(n + a + b - 2) with f_ik the probability that label i was flipped if expert k judged. It never lowers the objective.

Legend: n comparisons of one annotator, K experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.annotator_noise import HIGHEST, LOWEST, BetaPrior, noisy_log_lik, row_flips, update_noise
from prefmix.mixture.likelihoods.soft_labels import soft_label_log_lik

MAX_STEPS = 1000
TOLERANCE = 1e-8

Responsibilities = Callable[[Float[Tensor, "n K"]], Float[Tensor, "n K"]]


class JudgedRows(NamedTuple):
    """What one annotator said.

    Attributes:
        margins: [n, K] m_ik, nats.
        weight: [n] a_i.
        label: [n] probability that the first response is the better one; None: 1 everywhere.
    """

    margins: Float[Tensor, "n K"]
    weight: Float[Tensor, "n"]
    label: Float[Tensor, "n"] | None = None

    def log_lik(self, rate: float) -> Float[Tensor, "n K"]:
        """[n, K] log p_ik at one error rate, nats."""
        noise = self.margins.new_full((len(self.margins),), rate)
        win = noisy_log_lik(self.margins, noise)
        return win if self.label is None else soft_label_log_lik(win, noisy_log_lik(-self.margins, noise), self.label)

    def flipped(self, rate: float, resp: Float[Tensor, "n K"]) -> Float[Tensor, "n"]:
        """[n] probability that each label was flipped."""
        return row_flips(self.margins, self.margins.new_full((len(self.margins),), rate), resp, self.label)


def prior_with_past(prior: BetaPrior, rate: float, count: float) -> BetaPrior:
    """The prior with an annotator's earlier comparisons, which keep the flips that they had (incremental EM).

    Their number F of flips is read off the rate that it led to: rate = (F + a - 1) / (count + a + b - 2).

    Args:
        prior: Beta(a, b) of somebody unknown.
        rate: the annotator's rate after these comparisons.
        count: their summed weight.
    """
    flips = rate * (count + prior.a + prior.b - 2.0) - (prior.a - 1.0)
    flips = min(max(flips, 0.0), count)
    return BetaPrior(prior.a + flips, prior.b + count - flips)


def fit_user_noise(
    rows: JudgedRows,
    prior: BetaPrior,
    first: float,
    responsibilities: Responsibilities,
    *,
    max_steps: int = MAX_STEPS,
    tolerance: float = TOLERANCE,
) -> float:
    """The annotator's rate, a stationary point of evidence + log prior.

    Args:
        rows: the annotator's comparisons.
        prior: Beta(a, b), earlier comparisons counted in.
        first: where EM starts, such as the mean rate of the population.
        responsibilities: [n, K] log p_ik -> [n, K] q_ik, who judged each row at these likelihoods; weights that are
            fitted too are refitted here.
        max_steps: of EM.
        tolerance: smallest change of the rate that is followed.
    """
    nobody_else = torch.zeros(len(rows.weight), dtype=torch.long)
    rate = min(max(first, LOWEST), HIGHEST)
    for _ in range(max_steps):
        flipped = rows.flipped(rate, responsibilities(rows.log_lik(rate)))
        previous = rate
        rate = float(update_noise(flipped, rows.weight, nobody_else, 1, prior).clamp(LOWEST, HIGHEST))
        if abs(rate - previous) < tolerance:
            break
    return rate
