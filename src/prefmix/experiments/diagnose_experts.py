"""What trained experts look like on rows, better held-out ones: collapse, length, displacement, noise, calibration.

Pure functions of rewards, weights and lengths. Legend: B comparisons, U users, K experts, S starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from prefmix.data.counted import counted
from prefmix.evaluation.metrics import adjusted_rand_index, reliability
from prefmix.experiments.diagnosis import Finding
from prefmix.mixture.collapse import find_collapse
from prefmix.training.noise_options import stronger_prior

LENGTH_SHARE = 0.5
MINORITY = 0.3
NEARLY_RANDOM, MANY_RANDOM = 0.35, 0.1


class ScoredRows(NamedTuple):
    """Rows under a trained policy.

    Attributes:
        rewards_chosen, rewards_rejected: [B, K] implicit rewards, nats.
        probability: [B, K] p_k(chosen preferred).
        weights: [B, K] the weights that the policy uses for the row's user.
        user: [B] index of the user, -1 where unnamed.
        length_difference: [B] log words of the chosen response less those of the rejected one.
    """

    rewards_chosen: np.ndarray
    rewards_rejected: np.ndarray
    probability: np.ndarray
    weights: np.ndarray
    user: np.ndarray
    length_difference: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """[B, K] m_k."""
        return self.rewards_chosen - self.rewards_rejected


class LearntNoise(NamedTuple):
    """Label noise that training learnt, where `label_noise` only says where it starts.

    Attributes:
        rate: the mean rate, e.
        prior: Beta(a, b), or None where the policy does not say.
        per_annotator: one rate for each annotator, not one for everybody.
    """

    rate: float
    prior: Sequence[float] | None
    per_annotator: bool


def diagnose_scored(scored: ScoredRows, noise: LearntNoise | None = None) -> list[Finding]:
    """All checks of scored rows; `noise` is what training learnt of it, and decides which remedy works."""
    return [
        collapse(scored),
        length_split(scored),
        displacement(scored),
        noise_or_minority(scored, noise),
        calibration(scored, noise),
    ]


def collapse(scored: ScoredRows) -> Finding:
    """Experts that explain almost nobody, or repeat each other."""
    usage = scored.weights.mean(axis=0)
    found = find_collapse(torch.from_numpy(usage), torch.from_numpy(scored.margins))
    numbers = {f"usage_{k}": float(share) for k, share in enumerate(usage)}
    if not found:
        differ = ", all experts differ" if len(usage) > 1 else ": one expert"
        what = "usage " + " ".join(f"{share:.2f}" for share in usage) + differ
        return Finding("collapse", "fine", what, numbers)
    what = "; ".join(warning.message.split(". ")[0].split(": it is")[0] for warning in found)
    remedy = "fewer experts (prefmix choose_k says how many), gate_prior_alpha above 1, or a longer init_hold_epochs"
    return Finding("collapse", "warning", what, numbers, remedy)


def length_split(scored: ScoredRows) -> Finding:
    """Share of the experts' disagreement that the length of the responses explains.

    R^2 = sum_k (sum_i D_ik l_i)^2 / (sum_i l_i^2 sum_ik D_ik^2),  D_ik = m_ik less its mean over experts. No constant:
    swapping the two responses changes the sign of both.
    """
    disagreement = scored.margins - scored.margins.mean(axis=1, keepdims=True)
    length, total = scored.length_difference, float((disagreement**2).sum())
    norm = float((length**2).sum())
    if total == 0.0 or norm == 0.0:
        return Finding("length split", "fine", "experts or lengths do not differ", {"r2": 0.0})
    r2 = float(((disagreement * length[:, None]).sum(axis=0) ** 2).sum() / (norm * total))
    what = f"length explains {r2:.0%} of what the experts disagree about"
    if r2 > LENGTH_SHARE:
        remedy = "experts merely split on length: balance lengths in the pairs, or judge responses of like length"
        return Finding("length split", "warning", what, {"r2": r2}, remedy)
    return Finding("length split", "fine", what, {"r2": r2})


def displacement(scored: ScoredRows) -> Finding:
    """Likelihood displacement: the preferred response became less likely too.

    Rewards are beta times the change of log-probability against the reference, weighted by the row's weights.
    """
    chosen = (scored.weights * scored.rewards_chosen).sum(axis=1)
    rejected = (scored.weights * scored.rewards_rejected).sum(axis=1)
    both = float(((chosen < 0) & (rejected < 0)).mean())
    numbers = {
        "mean_reward_chosen": float(chosen.mean()),
        "mean_reward_rejected": float(rejected.mean()),
        "both_fell": both,
    }
    means = f"chosen {chosen.mean():+.2f}, rejected {rejected.mean():+.2f} nats of reward"
    what = f"{means}; both fell in {both:.0%} of the rows"
    if chosen.mean() < 0 and both > 0.5:
        remedy = "probability goes to texts nobody compared: set sft_weight, lower learning_rate or epochs, raise beta"
        return Finding("displacement", "warning", what, numbers, remedy)
    return Finding("displacement", "fine", what, numbers)


def noise_or_minority(scored: ScoredRows, noise: LearntNoise | None = None) -> Finding:
    """Is the smallest group one with a taste, or people of a larger group who answer carelessly?

    For its users: log-likelihood under their expert k, against the best (1 - e) p_j + e (1 - p_j) of any larger expert
    j, with one noise e for all of them. A minority must win by two standard errors over users. Rows must be held out,
    or the minority's expert has seen the noise.
    """
    usage = scored.weights.mean(axis=0)
    small = int(usage.argmin())
    mine = (scored.user >= 0) & (scored.weights.argmax(axis=1) == small)
    users = np.unique(scored.user[mine])
    numbers = {"expert": float(small), "usage": float(usage[small]), "users": float(len(users))}
    if len(usage) == 1 or usage[small] > MINORITY or len(users) < 3:
        return Finding("noise or minority", "fine", "no small group to doubt", numbers)
    own = np.log(scored.probability[mine, small])
    best = _best_with_noise(np.delete(scored.probability[mine], small, axis=1))
    index = np.searchsorted(users, scored.user[mine])
    gain = np.bincount(index, own - best) / np.bincount(index)
    z = float(gain.mean() / max(gain.std(ddof=1) / np.sqrt(len(users)), 1e-12))
    numbers |= {"gain_over_noise": float(gain.mean()), "z": z}
    what = (
        f"expert {small} ({counted(len(users), 'user')}) explains its rows by {gain.mean():+.3f} nats a row better "
        f"than a noisy member of another group would (z = {z:.1f})"
    )
    if z < 2:
        remedy = f"these people may answer carelessly rather than differ: {_for_carelessness(noise)}one expert fewer"
        return Finding("noise or minority", "warning", what, numbers, remedy)
    return Finding("noise or minority", "fine", what, numbers)


def _for_carelessness(noise: LearntNoise | None) -> str:
    if noise is not None and noise.per_annotator:
        return "their rates are learnt already, so try "
    wanted = "label_noise_update: per_annotator" if noise is not None else "label_noise"
    return f"set {wanted}, and try "


def _best_with_noise(probability: np.ndarray) -> np.ndarray:
    """[B] log of (1 - e) p_j + e (1 - p_j) for the expert j and the noise e that explain all rows best."""
    noise = np.linspace(0.0, 0.5, 51)[:, None, None]
    p = probability.clip(1e-12, 1 - 1e-12)
    log_lik_EBK = np.log((1 - noise) * p + noise * (1 - p))
    e, j = np.unravel_index(log_lik_EBK.sum(axis=1).argmax(), (len(noise), p.shape[1]))
    return log_lik_EBK[e, :, j]


def annotators(rates: np.ndarray) -> Finding:
    """Who answers nearly at random, where training learnt an error rate for each annotator.

    Args:
        rates: [U] MAP error rates, NaN for people without training rows.
    """
    known = rates[~np.isnan(rates)]
    if not len(known):
        return Finding("annotators", "fine", "nobody has an error rate", {"annotators": 0.0})
    random = float((known > NEARLY_RANDOM).mean())
    numbers = {"annotators": float(len(known)), "mean_rate": float(known.mean()), "nearly_random": random}
    people = f"{random:.0%} of {len(known)} annotators are nearly at random"
    what = f"labels are flipped at {known.mean():.0%} on average; {people}"
    if random > MANY_RANDOM:
        remedy = "their rows hardly count in training already; leave them out, or look at what they were asked"
        return Finding("annotators", "note", what, numbers, remedy)
    return Finding("annotators", "fine", what, numbers)


def calibration(scored: ScoredRows, noise: LearntNoise | None = None, steps: int = 30) -> Finding:
    """Are probabilities as sure as they are right? The slope a of logit p -> a logit p that fits best; 1 is right."""
    p = (scored.weights * scored.probability).sum(axis=1).clip(1e-12, 1 - 1e-12)
    logit = np.log(p) - np.log1p(-p)
    slope = 1.0
    for _ in range(steps):
        wrong = 1.0 / (1.0 + np.exp((slope * logit).clip(-500, 500)))
        curvature = max(float((logit**2 * wrong * (1 - wrong)).sum()), 1e-12)
        # Steps are cut: far out the likelihood is flat and Newton's method would leap.
        slope += float(np.clip((logit * wrong).sum() / curvature, -0.5, 0.5))
    error = 1.0 / np.sqrt(curvature)
    ece = reliability(logit).ece
    numbers = {"slope": slope, "standard_error": float(error), "ece": ece}
    what = f"logits should be multiplied by {slope:.2f} +- {error:.2f}; expected calibration error {ece:.3f}"
    if slope + 2 * error < 0.8:
        remedy = f"too sure: {for_sureness(noise)}, lower the number of epochs, or judge on held-out rows"
        return Finding("calibration", "warning", what, numbers, remedy)
    if slope - 2 * error > 1.25:
        lower = "a lower label_noise where there is one" if noise is None else "a label_noise_prior with a lower mode"
        return Finding(
            "calibration", "warning", what, numbers, f"not sure enough: a higher learning_rate, more epochs, or {lower}"
        )
    return Finding("calibration", "fine", what, numbers)


def for_sureness(noise: LearntNoise | None) -> str:
    """Noise as given is given higher; where it is learnt, from rows that the experts came to fit, its prior is."""
    if noise is None:
        return "set or raise label_noise"
    such = "" if noise.prior is None else ", such as [{:g}, {:g}]".format(*stronger_prior(noise.prior))
    return f"label_noise is learnt (now {noise.rate:.2g}): give label_noise_prior more weight{such}"


def restart_agreement(labels: Sequence[np.ndarray], evidences: Sequence[float]) -> Finding:
    """Do the probe's better restarts find the same groups?

    Args:
        labels: S arrays [U], most probable expert of each user.
        evidences: [S] penalised evidence of each start; the better half is compared with the best.
    """
    order = np.argsort(evidences)[::-1][: max(2, (len(evidences) + 1) // 2)]
    if len(evidences) < 2:
        return Finding("restart agreement", "note", "a single start has nothing to agree with", {}, "")
    found = [adjusted_rand_index(labels[order[0]], labels[i]) for i in order[1:]]
    mean = float(np.mean(found))
    what = f"the better half of {len(evidences)} restarts agrees with the best one with ARI {mean:.2f}"
    if mean < 0.7:
        remedy = "the groups depend on the start: fewer experts, more rows a user, or more probe_restarts"
        return Finding("restart agreement", "warning", what, {"ari": mean}, remedy)
    return Finding("restart agreement", "fine", what, {"ari": mean})
