"""What the gate says of rows when it knows nothing of their users. Legend: B comparisons, K experts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.gates import Gate, GateInputs
from prefmix.training.setup import Comparisons


@torch.no_grad()
def unknown_user_log_weights(gate: Gate, comparisons: Comparisons) -> Float[Tensor, "B K"]:
    """[B, K] the gate of each row without its user, on the CPU."""
    table = comparisons.table
    device = gate.population_log_weights().device
    prompt_states = comparisons.prompt_states
    inputs = GateInputs(
        user=torch.full((len(table),), -1, device=device),
        prompt_states=None if prompt_states is None else prompt_states[torch.from_numpy(table.prompt)].to(device),
        metadata=None if comparisons.metadata is None else comparisons.metadata.to(device),
    )
    return gate(inputs).cpu()
