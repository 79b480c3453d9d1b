"""Wider and narrower gates, proved by what they say of random prompts, users and metadata."""

from __future__ import annotations

import pytest
import torch

from prefmix.mixture.gate_columns import narrowed, widened
from prefmix.mixture.gates import Gate, GateInputs

K, U, B, P, M = 3, 4, 50, 6, 2
TERMS = [
    ("global",),
    ("prompt",),
    ("global", "prompt", "user"),
    ("user",),
    ("global", "metadata"),
    ("metadata", "prompt"),
]


def make_gate(terms: tuple[str, ...], update: str = "gradient") -> Gate:
    generator = torch.Generator().manual_seed(0)
    gate = Gate(
        K,
        terms,
        num_users=U if "user" in terms else 0,
        prompt_dim=P if "prompt" in terms else 0,
        metadata_dim=M if "metadata" in terms else 0,
        update=update,
    )
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if update == "closed_form":
            gate.closed_form_update(torch.tensor([0.6, 0.3, 0.1]), 10)
    return gate


def inputs(scale: float = 1.0) -> GateInputs:
    generator = torch.Generator().manual_seed(1)
    return GateInputs(
        torch.randint(-1, U, (B,), generator=generator),
        scale * torch.randn(B, P, generator=generator),
        scale * torch.randn(B, M, generator=generator),
    )


def weights(gate: Gate, given: GateInputs) -> torch.Tensor:
    return gate(given).detach().double().exp()


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("expert", range(K))
def test_without_an_expert_all_others_keep_their_proportions(terms: tuple[str, ...], expert: int) -> None:
    gate = make_gate(terms)
    before, after = weights(gate, inputs()), weights(narrowed(gate, expert), inputs())
    kept = before[:, [k for k in range(K) if k != expert]]
    assert torch.allclose(after, kept / kept.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("update", ["closed_form", "fixed", "gradient"])
def test_a_global_gate_is_widened_exactly(update: str) -> None:
    gate = make_gate(("global",), update)
    wide = widened(gate, 0.25)
    expected = torch.cat([0.75 * gate.population_log_weights().exp(), torch.tensor([0.25])])
    assert torch.allclose(wide.population_log_weights().exp(), expected, atol=1e-6)
    assert wide.describe() == gate.describe() | {"num_experts": K + 1}


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_a_new_expert_has_its_weight_where_features_are_average_and_for_every_user(terms: tuple[str, ...]) -> None:
    gate = make_gate(terms)
    wide = widened(gate, 0.2)
    after = weights(wide, inputs(0.0))
    assert torch.allclose(after[:, K], torch.full((B,), 0.2, dtype=torch.float64), atol=1e-6)
    # Old experts keep their proportions for all features, whatever the new one's weight.
    before, after = weights(gate, inputs()), weights(wide, inputs())
    assert torch.allclose(after[:, :K] / after[:, :K].sum(1, keepdim=True), before, atol=1e-5)


@pytest.mark.parametrize("terms", [("prompt",), ("global", "metadata"), ("metadata", "prompt")], ids=str)
def test_a_new_experts_weight_moves_with_no_feature_to_first_order(terms: tuple[str, ...]) -> None:
    wide = widened(make_gate(terms), 0.2)
    prompt, metadata = torch.zeros(1, P, requires_grad=True), torch.zeros(1, M, requires_grad=True)
    log_weight = wide(GateInputs(torch.tensor([-1]), prompt, metadata))
    new = torch.autograd.grad(log_weight[0, K], [prompt, metadata], allow_unused=True, retain_graph=True)
    old = torch.autograd.grad(log_weight[0, 0], [prompt, metadata], allow_unused=True)
    assert all(gradient is None or gradient.abs().max() < 1e-6 for gradient in new)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in old)


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1])
def test_a_weight_is_a_share(weight: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        widened(make_gate(("global",)), weight)
