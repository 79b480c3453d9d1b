"""The error rate of one annotator, experts given: EM against a grid, and earlier comparisons as pseudo-comparisons."""

from __future__ import annotations

import pytest
import torch

from prefmix.mixture.annotator_noise import BetaPrior, update_noise
from prefmix.mixture.user_noise import JudgedRows, fit_user_noise, prior_with_past

F64 = torch.float64
PRIOR = BetaPrior(1.5, 3.0)


def problem(seed: int, soft: bool) -> tuple[JudgedRows, torch.Tensor]:
    """12 comparisons, a third of them against what all experts say, and log weights of 3 experts."""
    generator = torch.Generator().manual_seed(seed)
    margins = 2 * torch.randn(12, 3, dtype=F64, generator=generator) + 1.5
    margins[:4] *= -1
    weight = 0.5 + torch.rand(12, dtype=F64, generator=generator)
    label = 0.7 + 0.3 * torch.rand(12, dtype=F64, generator=generator) if soft else None
    return JudgedRows(margins, weight, label), torch.randn(3, dtype=F64, generator=generator).log_softmax(0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_em_ends_at_the_maximum_of_evidence_and_prior(seed: int, soft: bool) -> None:
    rows, log_weights = problem(seed, soft)

    def objective(rate: float) -> float:
        evidence = torch.logsumexp(log_weights + rows.weight @ rows.log_lik(rate), dim=0)
        return float(evidence + PRIOR.log_density(torch.tensor(rate, dtype=F64)))

    def judged(log_lik: torch.Tensor) -> torch.Tensor:
        return (log_weights + rows.weight @ log_lik).softmax(0).expand_as(log_lik)

    grid = torch.linspace(1e-4, 0.4999, 2001, dtype=F64).tolist()
    best = max(grid, key=objective)
    found = fit_user_noise(rows, PRIOR, 0.1, judged)
    assert found == pytest.approx(best, abs=5e-4) and 0.05 < found < 0.5
    path = [0.1]
    for _ in range(5):  # and never goes down on the way
        path.append(fit_user_noise(rows, PRIOR, path[-1], judged, max_steps=1))
    assert [objective(rate) for rate in path] == sorted(objective(rate) for rate in path)


def test_earlier_comparisons_keep_the_flips_that_led_to_the_rate() -> None:
    flipped, weight = torch.tensor([0.9, 0.2, 0.1, 0.3], dtype=F64), torch.tensor([1.0, 2, 1, 0.5], dtype=F64)
    nobody_else = torch.zeros(4, dtype=torch.long)
    whole = update_noise(flipped, weight, nobody_else, 1, PRIOR)
    first = update_noise(flipped[:2], weight[:2], nobody_else[:2], 1, PRIOR)
    past = prior_with_past(PRIOR, float(first), 3.0)
    assert past.a - PRIOR.a == pytest.approx(0.9 + 0.4)
    again = update_noise(flipped[2:], weight[2:], nobody_else[2:], 1, past)
    torch.testing.assert_close(again, whole)
