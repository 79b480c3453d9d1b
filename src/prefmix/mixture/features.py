"""Features of the probe: principal directions of pooled trunk states.

Legend: N texts, D hidden size, P features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Projector(NamedTuple):
    """The affine map that training texts chose; new texts go through the same one.

    Attributes:
        mean: [D] mean pooled state.
        directions: [D, Q] principal directions, scaled as `pool_features` says.
        length_mean: [] mean log length, or NaN where lengths are not a feature.
        length_scale: [] spread of the log length.
    """

    mean: Float[Tensor, "D"]
    directions: Float[Tensor, "D Q"]
    length_mean: Float[Tensor, ""]
    length_scale: Float[Tensor, ""]


class PooledFeatures(NamedTuple):
    """Features of the training texts, and the map that made them.

    Attributes:
        features: [N, P] columns by falling spread, unit mean square spread (length: unit spread).
        projector: the map; `project` applies it to new texts.
    """

    features: Float[Tensor, "N P"]
    projector: Projector


def pool_features(
    completion_mean: Float[Tensor, "N D"],
    dim: int,
    lengths: Int[Tensor, "N"] | None = None,
    centre_by: Int[Tensor, "N"] | None = None,
    spectrum_power: float = 0.5,
) -> PooledFeatures:
    """Principal directions of mean-pooled completion states, scaled to unit mean square spread.

        f(y)_q = (mean_t h_t - mean) . v_q / s_q * s_q^p / rms(s^p),   and log length, standardised, as one more column

    Under a common ridge, p is a prior of the coefficients: variance along q proportional to s_q^(2p). With p = 0 all
    directions are equally likely to matter, and many that hardly vary drown those that tell texts apart; with p = 1
    (a ridge on the states themselves) one direction with a huge spread hides all others. The middle had the best or
    nearly the best held-out evidence on training rows in every set tried (docs/lab-notes.md).

    Comparisons see differences of features under one prompt, so what texts of a prompt share cannot matter. With
    `centre_by` the directions are those of the variation *within* prompts; the features themselves are not centred
    within prompts (the difference does that), so a new text needs no companions.

    Args:
        completion_mean: [N, D] trunk states averaged over each text's completion positions.
        dim: number of principal directions, fewer where the texts span fewer.
        lengths: [N] completion tokens, at least 1; None leaves length out. As a column of its own, a preference for
            length shows itself instead of hiding in many directions.
        centre_by: [N] prompt of each text; None centres on all texts.
        spectrum_power: p, from 0 (unit spread in every column) to 1 (the spread of the states).

    Returns:
        PooledFeatures with P = min(dim, rank) (+ 1 with lengths).
    """
    assert dim >= 1, f"dim is {dim}"
    states = completion_mean.double()
    within = states - _means_by(states, centre_by)
    # A prompt with a single text has no variation; on such data the variation between prompts is all there is.
    if float(within.square().sum()) <= 1e-12 * float((states - states.mean(dim=0)).square().sum()):
        within = states - states.mean(dim=0)
    values, vectors = torch.linalg.eigh(within.T @ within / len(within))
    values, vectors = values.flip(0), vectors.flip(1)
    # Rounding is no variation: neither beside the largest direction nor beside the states themselves.
    floor = max(1e-9 * float(values[0]), 1e-12 * float(states.square().mean()))
    kept = min(dim, max(1, int((values > floor).sum())))
    spread = torch.where(values[:kept] > floor, values[:kept], 1.0).sqrt()
    prior = spread**spectrum_power
    directions = _signed(vectors[:, :kept]) / spread * (prior / prior.square().mean().sqrt())
    length_mean, length_scale = _length_scale(lengths)
    projector = Projector(states.mean(dim=0).float(), directions.float(), length_mean, length_scale)
    return PooledFeatures(project(projector, completion_mean, lengths), projector)


def project(
    projector: Projector, completion_mean: Float[Tensor, "N D"], lengths: Int[Tensor, "N"] | None = None
) -> Float[Tensor, "N P"]:
    """Features of texts, old or new, under a fitted projector.

    Args:
        projector: of `pool_features`.
        completion_mean: [N, D] pooled states.
        lengths: [N] completion tokens; needed exactly where the projector was fitted with lengths.
    """
    features = (completion_mean.float() - projector.mean) @ projector.directions
    with_length = not bool(torch.isnan(projector.length_mean))
    assert with_length == (lengths is not None), "lengths are given at fitting and projecting, or at neither"
    if lengths is None:
        return features
    column = (lengths.float().log() - projector.length_mean) / projector.length_scale
    return torch.cat([features, column.unsqueeze(1)], dim=1)


def _means_by(states: Float[Tensor, "N D"], index: Int[Tensor, "N"] | None) -> Float[Tensor, "..."]:
    """Mean of the states with the same index, for every state; the overall mean without an index."""
    if index is None:
        return states.mean(dim=0)
    _, position = torch.unique(index, return_inverse=True)
    count = torch.bincount(position).unsqueeze(1)
    sums = states.new_zeros(len(count), states.shape[1]).index_add(0, position, states)
    return (sums / count)[position]


def _signed(vectors: Float[Tensor, "D Q"]) -> Float[Tensor, "D Q"]:
    """Makes the largest entry of every direction positive, so that a rerun gives the same features."""
    largest = vectors.abs().argmax(dim=0)
    return vectors * vectors[largest, torch.arange(vectors.shape[1])].sign()


def _length_scale(lengths: Int[Tensor, "N"] | None) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    if lengths is None:
        return torch.tensor(torch.nan), torch.tensor(1.0)
    logs = lengths.double().log()
    spread = logs.std(unbiased=False)
    return logs.mean().float(), torch.where(spread > 0, spread, 1.0).float()
