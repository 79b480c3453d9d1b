"""The implementations of K low-rank heads behind one face, and which of them "auto" takes.

| name       | what it is                                                                                  |
| ---------- | ------------------------------------------------------------------------------------------- |
| `eager`    | [K, T, V] materialised; for tests                                                           |
| `chunked`  | pure torch, tile by tile, on any device                                                     |
| `triton`   | GPU kernels                                                                                 |
| `auto`     | the one that PREFMIX_KERNEL names, else `triton` on CUDA where it is installed, else chunked |

Legend: T tokens, K experts, D hidden, V vocabulary, r rank.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.kernels.low_rank_chunked import CHUNKED
from prefmix.kernels.low_rank_problem import Passes, Problem, TokenLogProbs
from prefmix.kernels.low_rank_tokens import tiled_token_log_probs
from prefmix.kernels.next_token import base_logits
from prefmix.kernels.tiles import Tiles

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "chunked", "eager", "triton"]
VARIABLE = "PREFMIX_KERNEL"

# (hidden, low, up, base_weight, bias, targets, tiles); gradients flow to hidden, low and up.
TokenFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tiles], TokenLogProbs]


# Those that work by tiles of base logits.
_PASSES = {"chunked": CHUNKED}


def choose(impl: str, device: torch.device, dtype: torch.dtype) -> TokenFunction:
    """The implementation for tensors on `device` that accumulate in `dtype`.

    Raises:
        ValueError: an unknown name, or one that cannot work on this device.
    """
    name = resolve(impl, device, dtype)
    if name == "triton":
        return _triton()
    return _eager if name == "eager" else functools.partial(_tiled, passes=_PASSES[name])


def choose_passes(impl: str, device: torch.device, dtype: torch.dtype) -> Passes:
    """The two passes of the implementation, for who wants to see base logits between them.

    Raises:
        ValueError: as `choose`, or an implementation that has no such passes.
    """
    name = resolve(impl, device, dtype)
    if name not in _PASSES and impl == "auto":
        name = "chunked"
    if name not in _PASSES:
        raise ValueError(f"impl={impl!r}: streamed gradients need tiles of base logits; use 'auto' or 'chunked'")
    return _PASSES[name]


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of an implementation, "auto" resolved.

    Raises:
        ValueError: an unknown name.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(get_args(Implementation))}")
    return automatic(device, dtype) if impl == "auto" else impl


def automatic(device: torch.device, dtype: torch.dtype) -> str:
    """What "auto" means here.

    Raises:
        ValueError: the environment variable names no implementation.
    """
    named = os.environ.get(VARIABLE, "auto")
    if named not in get_args(Implementation):
        raise ValueError(f"{VARIABLE}={named!r}: choose one of {', '.join(get_args(Implementation))}")
    if named != "auto":
        return named
    if device.type == "cuda" and dtype == torch.float32 and _has_triton():
        return "triton"
    return "chunked"


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    found = found and importlib.util.find_spec("prefmix.kernels.triton_low_rank") is not None
    logger.debug("low-rank heads on CUDA: %s", "triton" if found else "chunked")
    return found


def _triton() -> TokenFunction:
    if not _has_triton():
        raise ValueError(
            "impl='triton': triton is not installed; install it (it comes with torch for CUDA) or use 'auto'"
        )
    from prefmix.kernels.triton_low_rank import low_rank_token_log_probs

    def token_log_probs(
        hidden: Tensor, low: Tensor, up: Tensor, base_weight: Tensor, bias: Tensor | None, targets: Tensor, tiles: Tiles
    ) -> TokenLogProbs:
        # Tiles are a matter of caches on a CPU; Triton has its own.
        return TokenLogProbs(*low_rank_token_log_probs(hidden, low, up, base_weight, bias, targets))

    return token_log_probs


def _tiled(
    hidden: Float[Tensor, "T D"],
    low: Float[Tensor, "K T r"],
    up: Float[Tensor, "K V r"],
    base_weight: Float[Tensor, "V D"],
    bias: Float[Tensor, "V"] | None,
    targets: Int[Tensor, "T"],
    tiles: Tiles,
    passes: Passes,
) -> TokenLogProbs:
    states = hidden.detach().to(base_weight.dtype)
    return tiled_token_log_probs(Problem(states, low, up, base_weight, bias, targets), hidden, tiles, passes)


def _eager(
    hidden: Float[Tensor, "T D"],
    low: Float[Tensor, "K T r"],
    up: Float[Tensor, "K V r"],
    base_weight: Float[Tensor, "V D"],
    bias: Float[Tensor, "V"] | None,
    targets: Int[Tensor, "T"],
    tiles: Tiles,
) -> TokenLogProbs:
    base = base_logits(hidden, base_weight, bias).to(low.dtype)
    logits = base + torch.einsum("ktr,kvr->ktv", low, up)
    index = targets[:, None]
    experts = logits.log_softmax(-1).gather(-1, index.expand(len(logits), -1, -1)).squeeze(-1)
    return TokenLogProbs(experts.T, base.detach().log_softmax(-1).gather(-1, index).squeeze(-1))
