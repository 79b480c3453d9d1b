"""Token dropout: a training step reads a random share of the completion tokens.

Legend: T completion tokens of a batch, N texts, L padded length, K experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefmix.policy.mixture_model import MixtureOutput


def drop_tokens(inputs: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Keeps each completion token of a batch with probability 1 - rate; the prompt and the trunk stay whole.

    Heads that read every token memorise their training texts. Reading another half of each text in every step keeps
    them from it, and a head costs in proportion to the tokens that it reads. Used in training alone.

    Args:
        inputs: a batch of `data.collator`, with cached states (`hidden`, `targets`, `segments`) or `completion_mask`.
        rate: share of tokens that is left out, 0 <= rate < 1; 0 returns the batch as it is.

    Returns:
        The batch with fewer tokens. Draws from the default generator of the batch's device.
    """
    if rate == 0:
        return inputs
    if "hidden" in inputs:
        keep = torch.rand(len(inputs["targets"]), device=inputs["targets"].device) >= rate
        return {**inputs, **{name: inputs[name][keep] for name in ("hidden", "targets", "segments")}}
    mask = inputs["completion_mask"]
    keep = torch.rand(mask.shape, device=mask.device) >= rate
    return {**inputs, "completion_mask": mask * keep}


def undo_scale(output: MixtureOutput, rate: float) -> MixtureOutput:
    """Sums over the kept tokens divided by 1 - rate: an unbiased estimate of log pi(y|x), experts and reference."""
    if rate == 0:
        return output
    scale = 1 / (1 - rate)
    return output._replace(log_probs=output.log_probs * scale, ref_log_probs=output.ref_log_probs * scale)
