"""Signs that a mixture is failing, and what to do about each.

Pure checks of statistics that training has anyway. Legend: B rows, G groups, K experts.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.posterior import kl_to_gate
from prefmix.mixture.precision import at_least_float32

Failure = Literal["dying", "duplicated", "undecided"]


class CollapseWarning(NamedTuple):
    """One thing that is going wrong.

    Attributes:
        failure: "dying" (an expert explains almost nobody), "duplicated" (two experts are one), "undecided" (the
            posterior says no more than the gate).
        experts: the experts concerned, empty for "undecided".
        message: what was seen and a remedy.
    """

    failure: Failure
    experts: tuple[int, ...]
    message: str


def dying_experts(usage: Float[Tensor, "K"]) -> list[CollapseWarning]:
    """Experts with a mean responsibility below 1 / (10 K).

    Args:
        usage: [K] mean of q over groups; sums to 1.
    """
    limit = 1.0 / (10.0 * len(usage))
    return [
        CollapseWarning(
            "dying",
            (k,),
            f"expert {k} explains {share:.1%} of the groups, less than {limit:.1%}: it is dying. Use fewer experts "
            f"(num_experts={max(1, len(usage) - 1)}), or gate_prior_alpha above 1, or a longer init_hold_epochs.",
        )
        for k, share in enumerate(usage.tolist())
        if share < limit
    ]


def duplicated_experts(margins: Float[Tensor, "B K"], threshold: float = 0.995) -> list[CollapseWarning]:
    """Pairs of experts whose margins correlate above `threshold`: they have learned one preference twice.

    Experts whose margins do not vary yet (at the start all are 0) are left out, and so are fewer than three rows.

    Args:
        margins: [B, K] m_ik on any rows.
        threshold: smallest correlation that counts as a copy.
    """
    if len(margins) < 3:
        return []
    centred = at_least_float32(margins) - at_least_float32(margins).mean(dim=0)
    length = centred.norm(dim=0)
    moved = length > 1e-6 * math.sqrt(len(margins))
    # Experts without spread are masked below; dividing them by 1 keeps NaN out of the product.
    unit = centred / torch.where(moved, length, 1.0)
    copies = (unit.T @ unit > threshold) & moved.unsqueeze(0) & moved.unsqueeze(1)
    return [
        CollapseWarning(
            "duplicated",
            (j, k),
            f"experts {j} and {k} have the same margins (correlation above {threshold}): they are one expert. Use "
            "fewer experts, init='probe' or another seed, or a longer init_hold_epochs.",
        )
        for j, k in copies.triu(diagonal=1).nonzero().tolist()
    ]


def undecided_posterior(
    log_resp: Float[Tensor, "G K"], log_weights: Float[Tensor, "G K"], limit: float = 1e-3
) -> list[CollapseWarning]:
    """A mean KL(q || w) below `limit` nats: the comparisons do not tell the experts apart.

    Args:
        log_resp: [G, K] log q.
        log_weights: [G, K] log w of the same groups.
        limit: nats.
    """
    if log_resp.shape[1] == 1 or len(log_resp) == 0:
        return []
    mean = float(kl_to_gate(log_resp, log_weights).mean())
    if mean >= limit:
        return []
    message = (
        f"the posterior moves {mean:.1e} nats from the gate on average: the comparisons do not tell the experts apart. "
        "Check that users have several comparisons each (prefmix diagnose), start from init='probe', or use one expert."
    )
    return [CollapseWarning("undecided", (), message)]


def find_collapse(
    usage: Float[Tensor, "K"],
    margins: Float[Tensor, "B K"],
    log_resp: Float[Tensor, "G K"] | None = None,
    log_weights: Float[Tensor, "G K"] | None = None,
) -> list[CollapseWarning]:
    """All warnings; `undecided` is looked for where responsibilities and gate are given."""
    if len(usage) == 1:
        return []
    found = dying_experts(usage) + duplicated_experts(margins)
    if log_resp is not None and log_weights is not None:
        found += undecided_posterior(log_resp, log_weights)
    return found
