"""Losses of pairs that others wrote, by name. Legend: B rows, K experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from prefmix.mixture.likelihoods.model import PROPER


class OwnLoss(NamedTuple):
    """A (pseudo-)log-likelihood of pairs.

    Attributes:
        log_lik: (margins [B, K], beta [K]) -> [B, K] nats, elementwise in the margins.
        proper: whether exp of it at m and at -m sum to 1.
    """

    log_lik: Callable[[Tensor, Tensor], Tensor]
    proper: bool


OWN_LOSSES: dict[str, OwnLoss] = {}


def is_proper(loss_type: str) -> bool:
    """Whether exp of a loss's log-likelihood is a probability."""
    return OWN_LOSSES[loss_type].proper if loss_type in OWN_LOSSES else loss_type in PROPER
