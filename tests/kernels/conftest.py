"""One problem for all heads: ragged texts, a vocabulary that no tile divides."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

LENGTHS = [1, 17, 3, 40, 2]
VOCAB, HIDDEN, RANK = 333, 32, 4


class Problem(NamedTuple):
    """One call of the kernel and a random gradient of its answer."""

    hidden: Tensor
    targets: Tensor
    segments: Tensor
    base_weight: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None
    grad: Tensor

    def double(self) -> Problem:
        """The same numbers in float64."""
        return Problem(*(x.double() if x is not None and x.is_floating_point() else x for x in self))


def _make_problem(
    num_experts: int = 3,
    *,
    lengths: list[int] = LENGTHS,
    dtype: torch.dtype = torch.float32,
    correction: float = 0.1,
    bias: bool = False,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = sum(lengths)
    return Problem(
        hidden=normal(tokens, HIDDEN).to(dtype),
        targets=torch.randint(VOCAB, (tokens,), generator=generator),
        segments=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        base_weight=(normal(VOCAB, HIDDEN) * 0.3).to(dtype),
        down=normal(num_experts, RANK, HIDDEN) / HIDDEN**0.5,
        up=normal(num_experts, VOCAB, RANK) * correction,
        bias=normal(VOCAB).to(dtype) if bias else None,
        grad=normal(len(lengths), num_experts),
    )


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    """Builds a seeded problem."""
    return _make_problem
