"""The number format of the core: float32 at least, whatever the model computes in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Float16 and bfloat16 become float32; float32 and float64 stay as they are.

    A log-likelihood of a whole user easily reaches -1e3 nats, where bfloat16 is spaced 4 nats apart.
    """
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
