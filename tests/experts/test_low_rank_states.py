"""Low-rank states: equal products at another rank, exact means, seeded noise."""

from __future__ import annotations

import torch

from prefmix.experts.low_rank_states import averaged, padded, pairs, perturbed, rank_of

generator = torch.Generator().manual_seed(0)


def make_state(rank: int, form: str = "head") -> dict[str, torch.Tensor]:
    down, up = torch.randn(rank, 6, generator=generator), torch.randn(9, rank, generator=generator)
    names = {"head": ("down", "up"), "branch": ("model.q.lora_A.weight", "model.q.lora_B.weight")}[form]
    return {names[0]: down, names[1]: up, "weight": torch.randn(4, 4, generator=generator)}


def product(state: dict[str, torch.Tensor]) -> torch.Tensor:
    ((down, up),) = pairs(state).items()
    return state[up] @ state[down]


def test_a_larger_rank_computes_the_same_and_can_be_trained() -> None:
    for form in ("head", "branch"):
        state = make_state(2, form)
        wide = padded(state, 5)
        assert rank_of(wide) == 5
        assert torch.equal(product(wide), product(state)) or torch.allclose(product(wide), product(state), atol=1e-6)
        ((down, _),) = pairs(wide).items()
        assert (wide[down][2:].abs().sum(1) > 0).all()  # a zero row beside a zero column would never move


def test_the_mean_is_that_of_the_products() -> None:
    states, weights = [make_state(r) for r in (2, 3, 2)], [0.5, 0.2, 0.3]
    mean = averaged(states, weights)
    assert rank_of(mean) == 7
    expected = sum(w * product(state) for w, state in zip(weights, states, strict=True))
    assert torch.allclose(product(mean), expected, atol=1e-6)
    assert torch.allclose(mean["weight"], sum(w * s["weight"] for w, s in zip(weights, states, strict=True)), atol=1e-6)


def test_noise_is_seeded_and_relative() -> None:
    state = {"weight": torch.full((200, 200), 3.0), "steps": torch.tensor([3])}
    one, same, other = perturbed(state, 0.1, 1), perturbed(state, 0.1, 1), perturbed(state, 0.1, 2)
    assert torch.equal(one["weight"], same["weight"]) and not torch.equal(one["weight"], other["weight"])
    assert abs((one["weight"] - 3).std() - 0.3) < 0.01
    assert torch.equal(one["steps"], state["steps"])
    assert torch.equal(perturbed(state, 0.0, 1)["weight"], state["weight"])
