"""Our EM and an independent implementation find one optimum: L-BFGS on the marginal likelihood, gradient by hand.

Nothing is shared: numpy in float64, the marginal (not the bound), weights through softmax, its own random starts. With
`weight_concentration=1` and hardly any ridge it is the likelihood itself; with both priors, the penalised one.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, logsumexp, softmax

from prefmix.mixture.linear_em import ProbeData, fit_linear_em


class Objective(NamedTuple):
    """-(sum_g log sum_k w_k prod_i p_ik^a_i + log priors) in (c, logits of w), and its gradient."""

    data: ProbeData
    experts: int
    ridge: float
    concentration: float

    def unpack(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = self.experts * self.data.difference.shape[1]
        return x[:size].reshape(self.experts, -1), x[size:]

    def evidence(self, c: np.ndarray, log_w: np.ndarray) -> tuple[float, np.ndarray]:
        d, group, a = (part.numpy() for part in self.data[:3])
        joint = np.tile(log_w, (self.data.num_groups, 1))
        np.add.at(joint, group, -np.logaddexp(0.0, -(d @ c.T)) * a[:, None])
        return float(logsumexp(joint, axis=1).sum()), softmax(joint, axis=1)

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        d, group, a = (part.numpy() for part in self.data[:3])
        c, logits = self.unpack(x)
        log_w = logits - logsumexp(logits)
        value, q = self.evidence(c, log_w)
        value += -0.5 * self.ridge * (c**2).sum() + (self.concentration - 1) * log_w.sum()
        of_c = (a[:, None] * q[group] * expit(-(d @ c.T))).T @ d - self.ridge * c
        pseudo = q.sum(0) + self.concentration - 1
        of_logits = pseudo - pseudo.sum() * np.exp(log_w)
        return -value, -np.concatenate([of_c.ravel(), of_logits])

    def best(self, starts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients and log weights of the best of several random starts."""
        rng, size = np.random.default_rng(seed), self.experts * (self.data.difference.shape[1] + 1)
        options = {"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": 1e-9}
        runs = [
            minimize(self, rng.normal(size=size), jac=True, method="L-BFGS-B", options=options) for _ in range(starts)
        ]
        c, logits = self.unpack(min(runs, key=lambda run: run.fun).x)
        return c, logits - logsumexp(logits)


def _data(experts: int, seed: int, users: int = 45, rows: int = 16) -> ProbeData:
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    tastes = 1.5 * torch.randn(experts, 3, **options)
    group = torch.arange(users).repeat_interleave(rows)
    difference = torch.randn(users * rows, 3, **options)
    right = torch.sigmoid((difference * tastes[group % experts]).sum(1))
    difference[torch.rand(len(right), **options) > right] *= -1
    return ProbeData(difference, group, torch.rand(len(group), **options) + 0.5, users)


def _ours(data: ProbeData, experts: int, ridge: float, concentration: float) -> tuple[float, np.ndarray, np.ndarray]:
    fit = fit_linear_em(
        data, experts, torch.full((6,), ridge), anneal=3.0, generator=torch.Generator().manual_seed(1),
        tolerance=0.0, max_steps=1500, weight_concentration=concentration,
    )  # fmt: skip
    best = int(fit.penalised.argmax())
    return float(fit.log_evidence[best]), fit.coefficients[best].numpy(), fit.log_weights[best].numpy()


def test_the_reference_gradient_is_right() -> None:
    objective = Objective(_data(2, 0), 2, 0.7, 2.0)
    x = np.random.default_rng(1).normal(size=8)
    numeric = [(objective(x + h)[0] - objective(x - h)[0]) / 2e-6 for h in 1e-6 * np.eye(8)]
    np.testing.assert_allclose(objective(x)[1], numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ridge", "concentration"), [(1e-9, 1.0), (2.0, 2.0)], ids=["likelihood", "with priors"])
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_the_same_optimum_and_the_same_parameters(experts: int, ridge: float, concentration: float) -> None:
    data = _data(experts, seed=experts)
    objective = Objective(data, experts, ridge, concentration)
    c, log_w = objective.best(starts=6)
    evidence, ours, our_log_w = _ours(data, experts, ridge, concentration)
    assert evidence / len(data.group) == pytest.approx(objective.evidence(c, log_w)[0] / len(data.group), abs=1e-6)
    assert objective.evidence(ours, our_log_w)[0] == pytest.approx(evidence, abs=1e-8)
    order = min(itertools.permutations(range(experts)), key=lambda p: np.abs(ours[list(p)] - c).max())
    np.testing.assert_allclose(ours[list(order)], c, atol=2e-4)
    np.testing.assert_allclose(our_log_w[list(order)], log_w, atol=2e-4)


def test_one_expert_is_scikit_learns_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    data, ridge = _data(1, 5), 2.0
    d, a = data.difference.numpy(), data.weight.numpy()
    # Every row stands there as a win and as a loss of the opposite difference, so its ridge 1/C is halved.
    model = LogisticRegression(C=1 / (2 * ridge), fit_intercept=False, tol=1e-12)
    model.fit(np.concatenate([d, -d]), np.repeat([1, 0], len(d)), sample_weight=np.tile(a, 2))
    evidence, ours, _ = _ours(data, 1, ridge, 2.0)
    np.testing.assert_allclose(ours[0], model.coef_[0], atol=1e-6)
    theirs = -(a * np.logaddexp(0.0, -(d @ model.coef_[0]))).sum()
    assert evidence / len(a) == pytest.approx(theirs / len(a), abs=1e-6)
