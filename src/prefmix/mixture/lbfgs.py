"""L-BFGS on a deterministic objective."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def maximise(
    objective: Callable[[], Tensor],
    parameters: list[Tensor],
    *,
    max_steps: int,
    scale: float,
    tolerance_change: float,
) -> None:
    """Moves `parameters` in place to a local maximum of `objective`, with a strong Wolfe line search.

    Args:
        objective: a function of the parameters, scalar, nats; the same value for the same parameters.
        parameters: leaves that require a gradient.
        max_steps: at most so many iterations.
        scale: the objective is divided by it, so that tolerances mean the same for all data sets.
        tolerance_change: stops where objective or parameters change by less.

    Source: Nocedal & Wright 2006, chapter 7.
    """
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_steps,
        history_size=20,
        tolerance_change=tolerance_change,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -objective() / scale
        loss.backward()
        return loss

    optimizer.step(closure)
