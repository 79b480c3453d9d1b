"""What a gate with a `prompt` term reads of new prompts: the mean of the frozen trunk's states.

Legend: B rows, P distinct prompts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from prefmix.experts.trunk import trunk_states


@torch.no_grad()
def pooled_prompt_states(base_model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "B D"]:
    """[B, D] float32 mean over a prompt's tokens of the final-norm state, on the CPU; equal prompts are read once.

    Relations: equals `TrunkStates.prompt_mean`, which the gate saw in training.
    """
    distinct = {tuple(prompt): None for prompt in prompts}
    pooled = {prompt: _mean_state(base_model, prompt) for prompt in distinct}
    return torch.stack([pooled[tuple(prompt)] for prompt in prompts])


def _mean_state(base_model: PreTrainedModel, prompt: Sequence[int]) -> Float[Tensor, "D"]:
    # One at a time: padding would change nothing but rounding, and prompts to be answered come few at a time.
    input_ids = torch.tensor([list(prompt)], device=base_model.device)
    return trunk_states(base_model, input_ids, torch.ones_like(input_ids))[0].float().mean(dim=0).cpu()
