"""The implementations of K low-rank heads behind one face, and which of them "auto" takes.

| name       | what it is                                                                                  |
| ---------- | ------------------------------------------------------------------------------------------- |
| `eager`    | [K, T, V] materialised; for tests                                                           |
| `chunked`  | pure torch, tile by tile, on any device                                                     |
| `compiled` | C, compiled with the machine's compiler on first use; CPU, float32 sums, rank up to 64      |
| `triton`   | GPU kernels                                                                                 |
| `auto`     | what PREFMIX_KERNEL names; else `triton` on CUDA, `compiled` on a CPU, where there are such |

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
from prefmix.kernels.low_rank_compiled import COMPILED, unsuitable, why_not
from prefmix.kernels.low_rank_problem import Demand, Passes, Problem, TokenLogProbs
from prefmix.kernels.low_rank_tokens import tiled_token_log_probs
from prefmix.kernels.next_token import base_logits
from prefmix.kernels.tiles import Tiles

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "eager", "chunked", "compiled", "triton"]
VARIABLE = "PREFMIX_KERNEL"

# (hidden, low, up, base_weight, bias, targets, tiles); gradients flow to hidden, low and up.
TokenFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tiles], TokenLogProbs]


# Those that work by tiles of base logits.
_PASSES = {"chunked": CHUNKED, "compiled": COMPILED}


def choose(impl: str, demand: Demand) -> TokenFunction:
    """The implementation of K low-rank heads for what is demanded.

    Raises:
        ValueError: an unknown name, or an implementation that cannot do it here.
    """
    name = resolve(impl, demand)
    if name == "triton":
        return _triton()
    return _eager if name == "eager" else functools.partial(_tiled, passes=_PASSES[name])


def choose_passes(impl: str, demand: Demand) -> Passes:
    """The two passes of the implementation, for who wants to see base logits between them.

    Raises:
        ValueError: as `choose`, or an implementation that has no such passes.
    """
    name = resolve(impl, demand)
    if name not in _PASSES and impl == "auto":
        name = "chunked"
    if name not in _PASSES:
        raise ValueError(f"impl={impl!r}: it has no tiles of base logits; use 'auto', 'chunked' or 'compiled'")
    return _PASSES[name]


def resolve(impl: str, demand: Demand) -> str:
    """The name of the implementation that is used, "auto" resolved.

    Raises:
        ValueError: an unknown name, here or in the environment, or an implementation that cannot do it here.
    """
    _check_name("impl", impl)
    if impl == "auto":
        return automatic(demand)
    if impl == "compiled" and (reason := unsuitable(demand) or why_not()) is not None:
        raise ValueError(f"impl='compiled': {reason}; use 'auto' or 'chunked'")
    return impl


def automatic(demand: Demand) -> str:
    """What "auto" means: a name in the environment counts where it can do what is demanded."""
    named = os.environ.get(VARIABLE, "auto")
    _check_name(VARIABLE, named)
    compiled = unsuitable(demand) is None and named in ("auto", "compiled") and why_not() is None
    if named not in ("auto", "compiled"):
        return named
    if (
        named == "auto"
        and demand.device.type == "cuda"
        and demand.dtype == torch.float32
        and _triton_agrees(demand.device)
    ):
        return "triton"
    return "compiled" if compiled else "chunked"


def _check_name(field: str, name: str) -> None:
    if name not in get_args(Implementation):
        raise ValueError(f"{field}={name!r}: choose one of {', '.join(get_args(Implementation))}")


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    found = found and importlib.util.find_spec("prefmix.kernels.triton_low_rank") is not None
    logger.debug("low-rank heads on CUDA: %s", "triton" if found else "chunked")
    return found


@functools.cache
def _triton_agrees(device: torch.device) -> bool:
    """Whether Triton is there and gives torch's numbers on this device; otherwise says so once."""
    if not _has_triton():
        return False
    from prefmix.kernels.triton_low_rank import why_not

    reason = why_not(device)
    if reason is not None:
        logger.warning("%s; low-rank heads run in torch (impl='chunked')", reason)
    return reason is None


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
