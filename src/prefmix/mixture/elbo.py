"""The evidence lower bound, one row at a time.

Legend: B rows, K experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.posterior import kl_to_gate
from prefmix.mixture.precision import at_least_float32


class RowELBO(NamedTuple):
    """The bound of each row and its two parts.

    Attributes:
        elbo: [B] a_i [E_q log p_i - KL(q_g || w_g) / n_g], nats. Summed over all rows of the training set: the ELBO.
        expected_log_lik: [B] E_q log p_i = sum_k r_ik log p_ik, unweighted.
        kl: [B] KL(q_g || w_g) of the row's group, unweighted and not shared out.
    """

    elbo: Float[Tensor, "B"]
    expected_log_lik: Float[Tensor, "B"]
    kl: Float[Tensor, "B"]


def elbo_rows(
    log_lik: Float[Tensor, "B K"],
    log_weights: Float[Tensor, "B K"],
    resp: Float[Tensor, "B K"],
    log_q: Float[Tensor, "B K"],
    weight: Float[Tensor, "B"],
    group_weight: Float[Tensor, "B"],
) -> RowELBO:
    """ELBO_i = a_i [E_q log p_i - KL(q_g || w_g) / n_g].

    The KL of a group is shared out over its rows in proportion to their weights, so that the sum over *any* split of
    the training set into minibatches is the full bound. At the exact posterior that is the log evidence, and the
    gradient with q held fixed is the evidence's gradient. The loss is - sum elbo / sum weight, with the denominator
    over the whole accumulated global batch: that division is the caller's.

    Args:
        log_lik: [B, K] log p_ik; gradient q_gk per row.
        log_weights: [B, K] log w of the row's group; gradient in the gate's logits (q - w) a_i / n_g.
        resp: [B, K] what multiplies log p_ik (q itself, or a sample of it), detached.
        log_q: [B, K] log q of the row's group, for the KL, detached.
        weight: [B] a_i.
        group_weight: [B] n_g, the summed weight of the row's group over the whole training set. Under
            `latent="pair"` it is 1 (not a_i): there the weight multiplies the whole bound.

    Source: method section 3; Neal & Hinton 1998.
    """
    log_lik = at_least_float32(log_lik)
    expected = (resp.to(log_lik.dtype) * log_lik).sum(dim=-1)
    kl = kl_to_gate(log_q, log_weights)
    # A group whose rows all weigh nothing has no say: its share is 0, not 0/0.
    share = kl / group_weight.to(kl.dtype).masked_fill(group_weight == 0, math.inf)
    return RowELBO(weight.to(kl.dtype) * (expected - share), expected, kl)
