"""What every E-step returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class EStep(NamedTuple):
    """Responsibilities of G groups over K experts, detached: the M-step holds them fixed.

    Attributes:
        resp: [G, K] what multiplies log p_k in the bound: q, or a sample of it. Rows sum to 1.
        log_q: [G, K] log q, for the KL to the gate and for statistics; -inf where q is 0.
    """

    resp: Float[Tensor, "G K"]
    log_q: Float[Tensor, "G K"]


# (log_weights [G, K], log_lik [G, K], *, temperature, generator) -> EStep
EStepFunction = Callable[..., EStep]
