"""Figures of merit as pure functions of arrays: accuracy, log-loss, calibration, agreement of groupings, gap closed.

Nothing here knows a model, a tokenizer or a data set. Legend: B comparisons, G groups (or users), K experts.

A comparison is scored by its *preference logit*, log p(y_w > y_l) - log p(y_l > y_w), in nats. The two
probabilities are computed by the same sum, so a model without an opinion gives exactly 0, which is a tie.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment


def _float(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def hits(logit: ArrayLike) -> np.ndarray:
    """[B] 1 where the preferred response is ranked first, 0.5 where the model is indifferent, 0 otherwise.

    Args:
        logit: [B] preference logits, nats.
    """
    logit_B = _float(logit)
    return np.where(np.isnan(logit_B), np.nan, 0.5 * (np.sign(logit_B) + 1.0))


def accuracy(logit: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Share of comparisons ranked as the person ranked them; a tie counts one half.

    Args:
        logit: [B] preference logits, nats.
        weight: [B] row weights, or None for equal ones.
    """
    return weighted_mean(hits(logit), weight)


def log_loss(log_prob: ArrayLike, weight: ArrayLike | None = None) -> float:
    """- mean log p(y_w > y_l), in nats per comparison; log 2 = 0.693 for a coin.

    Args:
        log_prob: [B] log-probability of the observed preference.
        weight: [B] row weights, or None for equal ones.
    """
    return -weighted_mean(log_prob, weight)


def weighted_mean(values: ArrayLike, weight: ArrayLike | None = None) -> float:
    """sum_i a_i v_i / sum_i a_i, and nan for no rows."""
    values_B = _float(values)
    weight_B = np.ones_like(values_B) if weight is None else _float(weight)
    total = weight_B.sum()
    return float((values_B * weight_B).sum() / total) if total > 0 else float("nan")


class Reliability(NamedTuple):
    """Confidence against accuracy in equal-width bins of confidence.

    Attributes:
        lower, upper: [M] bin edges; the bins divide [0.5, 1].
        num_rows: [M] comparisons in the bin.
        confidence: [M] mean of max(p, 1 - p); nan where empty.
        accuracy: [M] share ranked right; nan where empty.
        ece: sum_m num_rows_m / B * |accuracy_m - confidence_m|.
    """

    lower: np.ndarray
    upper: np.ndarray
    num_rows: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def reliability(logit: ArrayLike, num_bins: int = 10) -> Reliability:
    """Expected calibration error of preference probabilities, with the table it comes from.

    Which response is named first is a convention, so a comparison is folded to the response that the model prefers:
    confidence max(p, 1-p) in [0.5, 1], right or wrong. `num_bins` bins of equal width; the last one is closed.

    Args:
        logit: [B] preference logits, nats.
        num_bins: M.

    Source: Guo et al. 2017 (arXiv 1706.04599), equation 3, for binary choices.
    """
    logit_B = _float(logit)
    confidence_B = 1.0 / (1.0 + np.exp(-np.abs(logit_B)))
    bin_B = np.minimum(((confidence_B - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    count = np.bincount(bin_B, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bin_B, confidence_B, num_bins) / count
        mean_hits = np.bincount(bin_B, hits(logit_B), num_bins) / count
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    gap = np.nan_to_num(np.abs(mean_hits - mean_confidence))
    ece = float((count * gap).sum() / max(count.sum(), 1))
    return Reliability(edges[:-1], edges[1:], count, mean_confidence, mean_hits, ece)


def expected_calibration_error(logit: ArrayLike, num_bins: int = 10) -> float:
    """The `ece` of `reliability`."""
    return reliability(logit, num_bins).ece


def contingency(labels: ArrayLike, clusters: ArrayLike) -> np.ndarray:
    """[A, C] how many items carry the a-th distinct label and the c-th distinct cluster."""
    labels_G, clusters_G = np.asarray(labels), np.asarray(clusters)
    if labels_G.shape != clusters_G.shape or labels_G.ndim != 1:
        raise ValueError(f"labels {labels_G.shape} and clusters {clusters_G.shape} must be vectors of one length")
    label_index = np.unique(labels_G, return_inverse=True)[1]
    cluster_index = np.unique(clusters_G, return_inverse=True)[1]
    table = np.zeros((label_index.max(initial=-1) + 1, cluster_index.max(initial=-1) + 1), dtype=np.int64)
    np.add.at(table, (label_index, cluster_index), 1)
    return table


def adjusted_rand_index(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Agreement of two groupings over pairs of items, corrected for chance: 1 the same, 0 as good as random.

    ARI = (S - E) / ((S_a + S_c) / 2 - E), S the pairs together in both, E = S_a S_c / all pairs. Two groupings that
    are both trivial (one group, or all single) agree: 1.

    Args:
        labels: [G] group of each item.
        clusters: [G] the other grouping; which name is which does not matter.

    Source: Hubert & Arabie 1985, equation 5.
    """
    table = contingency(labels, clusters).astype(np.float64)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, of_labels, of_clusters = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    all_pairs = pairs(table.sum(keepdims=True))
    expected = of_labels * of_clusters / all_pairs if all_pairs > 0 else 0.0
    best = 0.5 * (of_labels + of_clusters)
    return 1.0 if best == expected else (together - expected) / (best - expected)


def normalized_mutual_information(labels: ArrayLike, clusters: ArrayLike) -> float:
    """I(labels; clusters) / ((H(labels) + H(clusters)) / 2), in [0, 1]; 1 when both are a single group.

    Args:
        labels: [G] group of each item.
        clusters: [G] the other grouping.

    Relations: not corrected for chance, unlike `adjusted_rand_index`.
    """
    joint = contingency(labels, clusters).astype(np.float64)
    joint = joint / max(joint.sum(), 1.0)

    def entropy(probabilities: np.ndarray) -> float:
        positive = probabilities[probabilities > 0]
        return float(-(positive * np.log(positive)).sum())

    of_labels, of_clusters = entropy(joint.sum(1)), entropy(joint.sum(0))
    mean_entropy = 0.5 * (of_labels + of_clusters)
    if mean_entropy == 0:
        return 1.0
    return float(np.clip((of_labels + of_clusters - entropy(joint)) / mean_entropy, 0.0, 1.0))


def matched_accuracy(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Share of items whose cluster carries their label under the best one-to-one matching (Hungarian algorithm).

    Args:
        labels: [G] group of each item.
        clusters: [G] the other grouping; clusters beyond the number of labels match nothing.
    """
    table = contingency(labels, clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / table.sum()) if table.sum() else float("nan")


class Agreement(NamedTuple):
    """Agreement of hard assignments with true groups.

    Attributes:
        ari: adjusted Rand index.
        nmi: normalised mutual information (arithmetic mean of the entropies).
        matched_accuracy: accuracy under the best matching.
        num_items: how many items have a true group.
    """

    ari: float
    nmi: float
    matched_accuracy: float
    num_items: int


def agreement(labels: ArrayLike, log_resp: ArrayLike) -> Agreement | None:
    """Agreement of the most probable expert of each item with its true group; items with label -1 are left out.

    Args:
        labels: [G] true groups, -1 where unknown.
        log_resp: [G, K] log responsibilities (or any score per expert).

    Returns:
        None when fewer than two items have a true group.
    """
    labels_G = np.asarray(labels)
    known = labels_G >= 0
    if known.sum() < 2:
        return None
    cluster_G = np.asarray(log_resp)[known].argmax(axis=1)
    truth_G = labels_G[known]
    return Agreement(
        adjusted_rand_index(truth_G, cluster_G),
        normalized_mutual_information(truth_G, cluster_G),
        matched_accuracy(truth_G, cluster_G),
        int(known.sum()),
    )


def usage(resp: ArrayLike) -> np.ndarray:
    """[K] mean responsibility of each expert over groups.

    Args:
        resp: [G, K] responsibilities, rows summing to 1.
    """
    return _float(resp).mean(axis=0)


class ShareOfGap(NamedTuple):
    """How much of the way from single DPO to the oracle the mixture goes.

    Attributes:
        share: (mixture - single) / (oracle - single), or None when undefined.
        gap: oracle - single.
        gap_se: standard error of the gap.
    """

    share: float | None
    gap: float
    gap_se: float

    def __str__(self) -> str:
        if self.share is None:
            return f"undefined (gap {self.gap:+.3f}, less than twice its standard error {self.gap_se:.3f})"
        return f"{100 * self.share:.0f}%"


def share_of_gap_closed(mixture: float, single: float, oracle: float, gap_se: float) -> ShareOfGap:
    """(mixture - single) / (oracle - single), undefined when the gap is smaller than twice its standard error.

    Args:
        mixture: accuracy of the mixture.
        single: accuracy of single DPO on the same comparisons.
        oracle: accuracy of per-group DPO on the same comparisons.
        gap_se: standard error of oracle - single (paired, clustered by user; see `evaluation.intervals`).
    """
    gap = oracle - single
    defined = np.isfinite(gap_se) and gap > 2 * gap_se and gap > 0
    return ShareOfGap(float((mixture - single) / gap) if defined else None, float(gap), float(gap_se))
