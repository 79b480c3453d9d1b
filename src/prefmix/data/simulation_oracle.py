"""How well simulated people can be predicted at best: by who knows their tastes, all tastes, or only the population.

Legend: B comparisons, K tastes, H hypotheses about a user (the K tastes, or draws from the Dirichlet distribution).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from prefmix.data.simulation import Judged, Simulated, outcome_log_probs
from prefmix.data.simulation_options import SimulationOptions

DRAWS = 2000
# Comparisons times hypotheses that are held at once.
SLICE = 500_000


class RulePerformance(NamedTuple):
    """Expected figures of a rule on the decided comparisons of a split, under the true probabilities.

    Attributes:
        accuracy: mean probability that the person answers as the rule says.
        log_loss: mean -E log q(answer), nats.
    """

    accuracy: float
    log_loss: float


class Oracle(NamedTuple):
    """The ladder of what can be known.

    Attributes:
        known_user: each user's own taste (or shares of tastes) is known.
        bayes: all tastes and their frequencies are known, the user only by the context comparisons: no method that
            learns from data can be expected to do better.
        population: all tastes and frequencies are known, nothing of the user.
    """

    known_user: RulePerformance
    bayes: RulePerformance
    population: RulePerformance


def oracle(simulated: Simulated, split: str = "test", *, seed: int = 0) -> Oracle:
    """The oracle's figures on a split.

    Args:
        simulated: the data set.
        split: `test` (context: the users' training comparisons) or `new_users` (context: the first half of each
            user's comparisons; the other half is scored).
        seed: of the Monte Carlo draws for continuous users.
    """
    judged, context, options = simulated.judged[split], simulated.judged["train"], simulated.options
    if split == "new_users":
        is_context = np.arange(len(judged.user)) % (2 * options.test_per_user) < options.test_per_user
        context, judged = _select(judged, is_context), _select(judged, ~is_context)
    judged = _select(judged, judged.answer != 0)
    hypotheses = _hypotheses(options, seed)
    log_prior = np.full(len(hypotheses), -np.log(len(hypotheses)))
    truth = true_probability(judged, simulated.weights[judged.user], options)
    bayes, population = np.empty_like(truth), np.empty_like(truth)
    # Users in slices: [rows, H, K] of everybody at once would not fit for draws from a Dirichlet distribution.
    users = np.unique(judged.user)
    for part in np.array_split(users, max(1, len(judged.user) * len(hypotheses) // SLICE)):
        asked, known = np.isin(judged.user, part), _select(context, np.isin(context.user, part))
        evidence = np.zeros((len(part), len(hypotheses)))
        answers = _answer_log_prob(known.margins, known.answer, hypotheses, options)
        np.add.at(evidence, np.searchsorted(part, known.user), answers)
        log_posterior = evidence + log_prior
        log_posterior -= logsumexp(log_posterior, axis=1, keepdims=True)
        margins, index = judged.margins[asked], np.searchsorted(part, judged.user[asked])
        bayes[asked] = _decided(margins, hypotheses, log_posterior[index], options)
        population[asked] = _decided(margins, hypotheses, log_prior, options)
    return Oracle(_performance(truth, truth), _performance(bayes, truth), _performance(population, truth))


def true_probability(judged: Judged, weights: np.ndarray, options: SimulationOptions) -> np.ndarray:
    """[B] probability that the user prefers the first text, given no tie: what a rule is best scored with.

    Args:
        judged: B comparisons.
        weights: [B, K] the share of each taste of each comparison's user.
        options: noise, ties and combination.
    """
    return _decided(judged.margins, weights[:, None], np.zeros((len(weights), 1)), options)


def _hypotheses(options: SimulationOptions, seed: int) -> np.ndarray:
    """[H, K] weights that a user may have, equally probable a priori."""
    if options.alpha is None:
        return np.eye(options.num_groups)
    return np.random.default_rng(seed).dirichlet(np.full(options.num_groups, options.alpha), size=DRAWS)


def _outcomes(margins: np.ndarray, hypotheses: np.ndarray, options: SimulationOptions) -> np.ndarray:
    """[3, B, H] log p of first, second, tie for margins [B, K] under weights [H, K], or [B, 1, K] for each row."""
    margins = margins[:, None]
    if options.combination == "log_linear":
        return outcome_log_probs((margins * hypotheses).sum(axis=-1), options)
    probabilities = np.exp(outcome_log_probs(margins, options))
    with np.errstate(divide="ignore"):
        return np.log((probabilities * hypotheses).sum(axis=-1))


def _answer_log_prob(
    margins: np.ndarray, answer: np.ndarray, hypotheses: np.ndarray, options: SimulationOptions
) -> np.ndarray:
    """[B, H] log p of the observed answers."""
    outcome = np.where(answer > 0, 0, np.where(answer < 0, 1, 2))
    return np.take_along_axis(_outcomes(margins, hypotheses, options), outcome[None, :, None], axis=0)[0]


def _decided(
    margins: np.ndarray, hypotheses: np.ndarray, log_weights: np.ndarray, options: SimulationOptions
) -> np.ndarray:
    """[B] probability of the first text given no tie, averaged over hypotheses as a Bayesian does."""
    log_probs = logsumexp(_outcomes(margins, hypotheses, options)[:2] + log_weights, axis=-1)
    return np.exp(log_probs[0] - np.logaddexp(log_probs[0], log_probs[1]))


def _performance(predicted: np.ndarray, truth: np.ndarray) -> RulePerformance:
    if len(truth) == 0:
        return RulePerformance(float("nan"), float("nan"))
    right = np.where(predicted == 0.5, 0.5, np.where(predicted > 0.5, truth, 1.0 - truth))
    loss = -(truth * np.log(predicted) + (1.0 - truth) * np.log1p(-predicted))
    return RulePerformance(float(right.mean()), float(loss.mean()))


def _select(judged: Judged, rows: np.ndarray) -> Judged:
    return Judged(*(column[rows] for column in judged))
