"""Can groups be found in these rows at all? Said before training, not after.

Anonymous pairs of two opposed, equal groups are exactly unidentified: every pair is a coin flip, whatever the model.
User ids with two or more rows identify groups; so does a prompt that separates them. Source: method section 4.

Legend: N texts, P features, B comparisons, D prompt features, F held-out pairs of texts.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.held_out import Gain, held_out_log_loss, paired_gain
from prefmix.mixture.kmeans import kmeans
from prefmix.mixture.precision import at_least_float32

Level = Literal["identified", "weak", "unidentified"]
# Four looks (one reward, three clusterings) at a one-sided 0.1% each: a false alarm in one data set in 200 or so.
Z_LIMIT = 3.0
MAX_ROWS = 20_000


class Identifiability(NamedTuple):
    """What the rows can tell about groups.

    Attributes:
        identified: False where the library must say "not identifiable".
        level: "identified"; "weak" (one shared preference shows, but nothing tells groups apart); "unidentified".
        reason: one or two sentences with the numbers and a remedy, for people.
        comparisons_per_user: mean rows of users that are named; 0 without users.
        share_repeated: share of rows whose user has two or more rows.
        shared_preference: held-out gain of one linear reward over a coin flip, nats a row, with its z.
        prompt_dependence: held-out gain of a linear reward in each cluster of prompts over a coin flip and over the
            single reward, whichever is smaller in z.
        both_directions: share of repeated text pairs that were judged both ways.
    """

    identified: bool
    level: Level
    reason: str
    comparisons_per_user: float
    share_repeated: float
    shared_preference: Gain
    prompt_dependence: Gain
    both_directions: float


def identifiability(
    features: Float[Tensor, "N P"],
    chosen: Int[Tensor, "B"],
    rejected: Int[Tensor, "B"],
    user: Int[Tensor, "B"],
    prompt: Int[Tensor, "B"],
    prompt_features: Float[Tensor, "Q D"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Identifiability:
    """Structure first (do ids repeat?), then held-out evidence that anonymous rows are more than coin flips.

    Args:
        features: [N, P] standardised features of the texts.
        chosen: [B] index of the preferred text.
        rejected: [B] index of the other text.
        user: [B] user of each row, -1 where unnamed.
        prompt: [B] prompt of each row, an index into `prompt_features`.
        prompt_features: [Q, D] features of the prompts, or None to tell prompts apart by their index alone.
        generator: source of folds and clusters; None seeds one with 0.

    Returns:
        Identifiability. Seconds for 20,000 rows; more rows are sampled.
    """
    generator = generator or torch.Generator().manual_seed(0)
    per_user, share = _rows_per_user(user)
    keep = torch.randperm(len(chosen), generator=generator)[:MAX_ROWS]
    chosen, rejected, prompt = chosen[keep], rejected[keep], prompt[keep]
    pair, both = _text_pairs(chosen, rejected)
    features = at_least_float32(features)
    difference = features[chosen] - features[rejected]
    coin = torch.full((len(chosen),), math.log(2.0), dtype=features.dtype)
    single = held_out_log_loss(difference, pair, torch.zeros_like(chosen), generator)
    shared = paired_gain(coin, single, pair)
    clusterings = _clusterings(prompt, prompt_features, generator)
    dependence = _prompt_dependence(difference, pair, coin, single, clusterings, generator)
    level, reason = _judge(share, per_user, shared, dependence)
    return Identifiability(level != "unidentified", level, reason, per_user, share, shared, dependence, both)


def _judge(share: float, per_user: float, shared: Gain, dependence: Gain) -> tuple[Level, str]:
    if share >= 0.5:
        return "identified", f"user ids repeat ({per_user:.1f} comparisons per user), so groups of users can be found."
    part = f"only {share:.0%} of the rows belong" if share > 0 else "no row belongs"
    ids = f"{part} to a user with two or more comparisons"
    if dependence.z > Z_LIMIT:
        return "identified", (
            f"{ids}, but what is preferred depends on the prompt (held-out gain {dependence.mean:.3f} nats a row, "
            f"z = {dependence.z:.1f}), so groups that the prompt separates can be found with a prompt gate."
        )
    if shared.z > Z_LIMIT:
        return "weak", (
            f"{ids}. One shared preference shows (held-out gain {shared.mean:.3f} nats a row, z = {shared.z:.1f}), but "
            "nothing tells groups apart: expect experts that agree. Add a user column to find groups."
        )
    return "unidentified", (
        f"the groups in these rows are not identifiable: {ids}, and held-out preferences look like coin flips, for one "
        f"shared preference (z = {shared.z:.1f}) and for one per kind of prompt (z = {dependence.z:.1f}). Equal groups "
        "with opposed tastes look exactly like this. Add a user column (two or more comparisons per user), or metadata."
    )


def _rows_per_user(user: Int[Tensor, "B"]) -> tuple[float, float]:
    """Mean rows per named user, and the share of all rows whose user has at least two."""
    named = user[user >= 0]
    if len(named) == 0:
        return 0.0, 0.0
    count = torch.bincount(named)
    return float(count[count > 0].double().mean()), float(count[count >= 2].sum()) / len(user)


def _text_pairs(chosen: Int[Tensor, "B"], rejected: Int[Tensor, "B"]) -> tuple[Int[Tensor, "B"], float]:
    """Index of each row's unordered pair of texts, and the share of repeated pairs judged both ways."""
    low, high = torch.minimum(chosen, rejected), torch.maximum(chosen, rejected)
    _, pair = torch.unique(torch.stack([low, high]), dim=1, return_inverse=True)
    total = torch.bincount(pair)
    upward = torch.bincount(pair, weights=(chosen < rejected).double())
    repeated = total >= 2
    if not repeated.any():
        return pair, 0.0
    both = (upward > 0) & (upward < total)
    return pair, float(both[repeated].double().mean())


def _clusterings(
    prompt: Int[Tensor, "B"], prompt_features: Float[Tensor, "Q D"] | None, generator: torch.Generator
) -> list[Int[Tensor, "B"]]:
    """Ways of sorting the rows by prompt: k-means of the prompts' features, or the prompts themselves if few."""
    distinct, position = torch.unique(prompt, return_inverse=True)
    if len(distinct) <= 1:
        return []
    if len(distinct) <= 8:
        return [position]
    if prompt_features is None:
        return []
    # A few leading directions, not rescaled: what separates prompts by kind is where they vary most.
    points = at_least_float32(prompt_features[distinct])
    points = points - points.mean(dim=0)
    _, _, directions = torch.linalg.svd(points, full_matrices=False)
    points = points @ directions[:8].T
    return [kmeans(points, size, generator).label[position] for size in (2, 4, 8)]


def _prompt_dependence(
    difference: Float[Tensor, "B P"],
    pair: Int[Tensor, "B"],
    coin: Float[Tensor, "B"],
    single: Float[Tensor, "B"],
    clusterings: list[Int[Tensor, "B"]],
    generator: torch.Generator,
) -> Gain:
    """Best clustering's held-out gain over both the coin and the single reward."""
    best = Gain(0.0, 0.0)
    for cluster in clusterings:
        loss = held_out_log_loss(difference, pair, cluster, generator)
        gain = min(paired_gain(coin, loss, pair), paired_gain(single, loss, pair), key=lambda g: g.z)
        best = max(best, gain, key=lambda g: g.z)
    return best
