"""Where responsibilities start: the named, seeded step that parts the experts.

Legend: B training rows, G latent groups, K experts, P features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.users import latent_groups, num_latent_groups
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.mixture.features import pool_features
from prefmix.mixture.held_out import Gain
from prefmix.mixture.initialization import kmeans_resp, label_resp, random_resp
from prefmix.mixture.posterior import posterior
from prefmix.mixture.probe import fit_probe, gain_over_one
from prefmix.training.config import MixtureConfig
from prefmix.training.penalties import pooling_like
from prefmix.training.starting_experts import come_apart

ResolvedInit = Literal["probe", "random", "kmeans", "labels", "experts"]


class Start(NamedTuple):
    """What an initializer may look at.

    Attributes:
        args: the configuration.
        table: training comparisons.
        group: [B] latent group of each row.
        num_groups: G.
        states: gives pooled trunk states; called only by initializers that need them.
        evidence: gives [G, K] log-likelihoods of every group under the experts as they are; likewise.
    """

    args: MixtureConfig
    table: ComparisonTable
    group: np.ndarray
    num_groups: int
    states: Callable[[], TrunkStates]
    evidence: Callable[[], Tensor]

    @property
    def generator(self) -> torch.Generator:
        """A fresh generator of the run's seed."""
        return torch.Generator().manual_seed(self.args.seed)


class Beginning(NamedTuple):
    """Where training starts.

    Attributes:
        resp: [G, K] first responsibilities; rows sum to 1.
        pooling: how strongly they ask for experts to be drawn together (`penalties`); 0: not.
        gain: of the probe's groups over one, on held-out users; None: no probe, or nothing to compare.
    """

    resp: Tensor
    pooling: float = 0.0
    gain: Gain | None = None


def resolve_init(args: MixtureConfig, table: ComparisonTable) -> ResolvedInit:
    """`auto`: `experts` where they come trained and differ, else `probe` where some user has two rows, else the others.

    Those are `kmeans` and `random`: k-means clusters prompts; `random` is for want of prompts.
    """
    if args.init != "auto":
        return args.init
    if come_apart(args):
        return "experts"
    known = table.user[table.user >= 0]
    if len(known) > len(np.unique(known)):
        return "probe"
    return "kmeans" if len(np.unique(table.prompt)) >= args.num_experts else "random"


def first_responsibilities(init: ResolvedInit, start: Start) -> Beginning:
    """Responsibilities that are held while the experts have not parted yet.

    Args:
        init: the initializer.
        start: rows, groups and trunk states.

    Raises:
        ValueError: the rows lack what the initializer reads.
    """
    found = INITIALIZERS[init](start)
    assert found.resp.shape == (start.num_groups, start.args.num_experts)
    return found


def _probe(start: Start) -> Beginning:
    """Users' posteriors under a mixture of linear rewards; rows of one user share them under `pair` too.

    Its rewards are held by a ridge that held-out users chose, and experts that are trained afterwards by nothing: so
    what they want differently is held as strongly as the probe holds it (`penalties.pooling_like`).
    """
    table, states = start.table, start.states()
    lengths = torch.tensor([len(ids) for ids in table.texts.completion_ids])
    prompt = torch.from_numpy(table.texts.prompt_index)
    pooled = pool_features(states.completion_mean, start.args.probe_dim, lengths, centre_by=prompt)
    user_group = latent_groups(table, "user")
    columns = (table.chosen, table.rejected, user_group, table.weight)
    chosen, rejected, group, weight = (torch.from_numpy(column) for column in columns)
    rows = (pooled.features, chosen, rejected, group)
    result = fit_probe(
        *rows,
        num_latent_groups(table, "user"),
        start.args.num_experts,
        weight=weight,
        restarts=start.args.probe_restarts,
        generator=start.generator,
    )
    several = start.args.num_experts > 1
    gain = gain_over_one(result, *rows, weight=weight, generator=start.generator) if several else None
    resp = torch.softmax(result.log_resp, dim=1)
    difference = pooled.features[table.chosen] - pooled.features[table.rejected]
    precision = result.ridge + result.pooling
    pooling = pooling_like(precision, difference, weight, start.args.num_experts)
    return Beginning(_of_groups(start, resp[group]), pooling, gain)


def _kmeans(start: Start) -> Beginning:
    """Clusters of prompts; a group has the mean prompt of its rows."""
    states = start.states().prompt_mean.float()
    prompt = torch.from_numpy(start.table.prompt)
    distinct = len(torch.unique(prompt))
    if distinct < start.args.num_experts:
        raise ValueError(
            f"init='kmeans' with num_experts={start.args.num_experts}: the rows have {distinct} distinct prompts, "
            "which cannot be parted into that many clusters; use init='probe' (needs user ids) or init='random'"
        )
    scale = states.std(dim=0, unbiased=False)
    standardised = (states - states.mean(dim=0)) / torch.where(scale > 0, scale, 1.0)
    group = torch.from_numpy(start.group)
    sums = torch.zeros(start.num_groups, states.shape[1]).index_add_(0, group, standardised[prompt])
    size = torch.bincount(group, minlength=start.num_groups).clamp(min=1).unsqueeze(1)
    return Beginning(kmeans_resp(sums / size, start.args.num_experts, start.generator))


def _random(start: Start) -> Beginning:
    return Beginning(random_resp(start.num_groups, start.args.num_experts, start.generator))


def _labels(start: Start) -> Beginning:
    """The true groups: the oracle."""
    labels = torch.from_numpy(start.table.group)
    if not (labels >= 0).any():
        raise ValueError("init='labels': no row has a `group`; add that column, or use init='probe'")
    return Beginning(_of_groups(start, label_resp(labels, start.args.num_experts)))


def _experts(start: Start) -> Beginning:
    """Posteriors under the experts themselves, at equal weights."""
    evidence = start.evidence()
    uniform = torch.full_like(evidence, 1.0 / evidence.shape[1]).log()
    return Beginning(posterior(uniform, evidence).log_resp.exp().cpu())


def _of_groups(start: Start, row_resp: Float[Tensor, "B K"]) -> Float[Tensor, "G K"]:
    """Responsibilities of groups from those of their rows, which agree; uniform for groups without rows."""
    resp = torch.full((start.num_groups, row_resp.shape[1]), 1.0 / row_resp.shape[1])
    resp[torch.from_numpy(start.group)] = row_resp
    return resp


INITIALIZERS: dict[ResolvedInit, Callable[[Start], Beginning]] = {
    "probe": _probe,
    "kmeans": _kmeans,
    "random": _random,
    "labels": _labels,
    "experts": _experts,
}
