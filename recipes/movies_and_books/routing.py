"""Is the gate right? Its routes against the true domains, and against a linear classifier that was told them.

Legend: P prompts, D hidden, K experts, B comparisons.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from prefmix.policy.mixture_policy import MixturePolicy

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


class Classifier(NamedTuple):
    """A ridge logistic regression on standardised states.

    Attributes:
        mean, scale: [D] of the training states.
        coefficients: [D + 1], the intercept last.
        ridge: that validation prompts chose.
    """

    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    ridge: float

    def predict(self, states: np.ndarray) -> np.ndarray:
        """[P] 0 or 1."""
        return (_with_intercept((states - self.mean) / self.scale) @ self.coefficients > 0).astype(int)


def fit_classifier(train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray]) -> Classifier:
    """Logistic regression by L-BFGS; the ridge with the best accuracy on validation prompts, the strongest of equals.

    Args:
        train: states [P, D] and labels [P] in {0, 1}.
        validation: the same of other prompts.
    """
    states, labels = train
    mean, scale = states.mean(0), states.std(0)
    scale = np.where(scale > 1e-6 * scale.max(), scale, 1.0) * np.sqrt(states.shape[1])
    features, sign = _with_intercept((states - mean) / scale), 2.0 * labels - 1
    found, coefficients = [], np.zeros(features.shape[1])
    for ridge in sorted(RIDGES, reverse=True):
        coefficients = _logistic(features, sign, ridge, coefficients)
        classifier = Classifier(mean, scale, coefficients, ridge)
        found.append((float((classifier.predict(validation[0]) == validation[1]).mean()), classifier))
    return max(found, key=lambda pair: pair[0])[1]


def expert_of_domain(log_weights: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """[2] which expert serves which domain: the assignment that most training prompts follow.

    Args:
        log_weights: [P, 2] of training prompts.
        domain: [P] 0 or 1.
    """
    straight = (log_weights.argmax(1) == domain).mean()
    return np.array([0, 1] if straight >= 0.5 else [1, 0])


def share_of_oracle(chosen: float, uniform: float, oracle: float) -> float | None:
    """(chosen - uniform) / (oracle - uniform): how much of what routing can give these weights give; None where 0/0."""
    return float((chosen - uniform) / (oracle - uniform)) if oracle != uniform else None


def experts_hash(policy: MixturePolicy) -> str:
    """SHA-256 of every parameter of every expert."""
    digest, experts = hashlib.sha256(), policy.model.experts
    for expert in range(experts.num_experts):
        for name, tensor in sorted(experts.expert_state(expert).items()):
            digest.update(f"{expert} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _logistic(features: np.ndarray, sign: np.ndarray, ridge: float, start: np.ndarray) -> np.ndarray:
    penalised = np.r_[np.full(features.shape[1] - 1, ridge), 0.0]

    def loss(c: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (features @ c)
        wrong = sign / (1 + np.exp(np.clip(margin, -500, 500)))
        value = np.logaddexp(0, -margin).sum() + 0.5 * (penalised * c * c).sum()
        return float(value), -(features.T @ wrong) + penalised * c

    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x)


def _with_intercept(features: np.ndarray) -> np.ndarray:
    return np.c_[features, np.ones(len(features))]
