"""What EM keeps beside experts and gate, on two processes: users who blend, label noise, the E-step's network, beta."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

NAMES = ("membership", "encoder", "amortized")
KEPT = {
    "membership": ("em.q_mean", "em.noise_rate", "em.noise_flipped"),
    "encoder": ("em.q_mean", "model.gate.membership.encoder.factor.2.weight"),
    "amortized": ("em.threshold",),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["whole", "resumed"])
def test_two_processes_end_where_one_does(
    two: Path, one: dict[str, Any], runs: ModuleType, name: str, kind: str
) -> None:
    """Parameters and moments to 1e-4, and everything that EM keeps; both processes equal bit for bit."""
    expected = runs.ended_with(one[name][0])
    first, second = (load_file(str(two / f"{name}-{kind}-{rank}.safetensors")) for rank in (0, 1))
    for key in first:
        assert torch.equal(first[key], second[key]), key
    for key in KEPT[name]:
        assert float(expected[key].std()) > 1e-4, key
    assert first.keys() == expected.keys()
    for key in expected:  # a fit of q stops within 1e-3 nats, and the E-step's network takes 300 steps
        # A global gate is the mean of the responsibilities, so it is as rough as they are.
        rough = key.startswith(("em.q_", "em.amortized", "em.resp", "em.threshold", "model.gate"))
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if rough else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(first[key], expected[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")
