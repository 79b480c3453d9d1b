"""The streamed entry against `head_log_probs` and autograd, with the coefficients of a mixture's pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prefmix.kernels import streamed_head
from prefmix.kernels.low_rank_head import head_log_probs
from prefmix.kernels.streamed_head import connected_texts, head_log_probs_and_grads
from prefmix.kernels.texts import HeadLogProbs
from prefmix.kernels.tiles import Tiles

TILES = Tiles(tokens=16, vocab=100)
LENGTHS = [1, 17, 3, 40, 2, 9, 12, 5]
# Eight texts: a pair of its own; three texts in two pairs, one of them in both; two pairs over the same two texts, in
# both orders; a text without a pair.
CHOSEN, REJECTED = torch.tensor([3, 0, 1, 5, 6]), torch.tensor([1, 4, 2, 6, 5])
COMPONENTS = [0, 1, 1, 1, 0, 2, 2, 3]


def mixture_loss(log_probs: Tensor, base: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """-sum_i log sum_k w_k sigmoid(m_ik), with w uniform and beta 0.7: every expert's gradient depends on all."""
    rewards = 0.7 * (log_probs - base[:, None])
    log_lik = torch.nn.functional.logsigmoid(rewards[chosen] - rewards[rejected])
    return -log_lik.logsumexp(1).sum()


def pair_coefficient(texts: Tensor, values: HeadLogProbs) -> Tensor:
    """The gradient in dlogp of some texts, from the pairs among them alone."""
    place = {int(text): i for i, text in enumerate(texts)}
    pairs = [(place[int(c)], place[int(r)]) for c, r in zip(CHOSEN, REJECTED) if int(c) in place]
    log_probs = values.log_probs.clone().requires_grad_()
    if not pairs:
        return torch.zeros_like(log_probs)
    chosen, rejected = torch.tensor(pairs).T
    with torch.enable_grad():
        loss = mixture_loss(log_probs, values.base_log_probs, chosen, rejected)
        return torch.autograd.grad(loss, log_probs)[0]


def by_autograd(problem: Any, impl: str) -> dict[str, Tensor]:
    leaves = {name: getattr(problem, name).clone().requires_grad_() for name in ("down", "up", "hidden")}
    down, up, hidden = leaves.values()
    texts = (hidden, problem.targets, problem.segments, len(LENGTHS), problem.base_weight)
    found = head_log_probs(*texts, down, up, bias=problem.bias, impl=impl, tiles=TILES)
    loss = mixture_loss(found.log_probs, found.base_log_probs, CHOSEN, REJECTED)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    values = {"log_probs": found.log_probs.detach(), "base": found.base_log_probs}
    return values | {f"grad_{name}": grad for name, grad in zip(leaves, grads)}


def streamed(problem: Any, tiles: Tiles = TILES, components: Tensor | None = None) -> dict[str, Tensor]:
    texts = (*problem[:3], len(LENGTHS), *problem[3:6])
    found = head_log_probs_and_grads(
        *texts,
        pair_coefficient,
        components=components,
        bias=problem.bias,
        with_hidden=True,
        impl="chunked",
        tiles=tiles,
    )
    assert found.grad_hidden is not None
    values = {"log_probs": found.log_probs, "base": found.base_log_probs}
    grads = {"grad_down": found.grad_down, "grad_up": found.grad_up, "grad_hidden": found.grad_hidden}
    return values | grads


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name] - x).double().norm() / x.double().norm()) for name, x in expected.items()}


@pytest.mark.parametrize("panel_tokens", [1, 30, 10**6], ids=["component by component", "panels", "one panel"])
@pytest.mark.parametrize("num_experts", [1, 2, 8])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float64, 1e-13)])
def test_equals_autograd(make_problem, monkeypatch, dtype, limit, num_experts, panel_tokens):
    monkeypatch.setattr(streamed_head, "_PANEL_TOKENS", panel_tokens)
    problem = make_problem(num_experts, lengths=LENGTHS, dtype=dtype, bias=True)
    problem = problem.double() if dtype == torch.float64 else problem
    found = streamed(problem, components=connected_texts(CHOSEN, REJECTED, len(LENGTHS)))
    assert found["grad_hidden"].dtype == problem.hidden.dtype
    off = errors(found, by_autograd(problem, "chunked"))
    assert max(off.values()) < limit, off
    if dtype == torch.float64:
        off = errors(found, by_autograd(problem, "eager"))
        assert max(off.values()) < 1e-12, off


def test_components_that_do_not_fit_the_budget_are_computed_twice(make_problem):
    problem = make_problem(2, lengths=LENGTHS).double()
    components = connected_texts(CHOSEN, REJECTED, len(LENGTHS))
    off = errors(streamed(problem, TILES._replace(kept_bytes=10**5), components), by_autograd(problem, "eager"))
    assert max(off.values()) < 1e-12, off


def test_coefficients_see_whole_components_and_every_text_once(make_problem, monkeypatch):
    monkeypatch.setattr(streamed_head, "_PANEL_TOKENS", 1)
    problem = make_problem(2, lengths=LENGTHS)
    seen: list[list[int]] = []

    def zero(texts: Tensor, values: HeadLogProbs) -> Tensor:
        seen.append(texts.tolist())
        return torch.zeros_like(values.log_probs)

    texts = (*problem[:3], len(LENGTHS), *problem[3:6])
    found = head_log_probs_and_grads(*texts, zero, components=torch.tensor(COMPONENTS), tiles=TILES)
    assert sorted(seen) == [[0, 4], [1, 2, 3], [5, 6], [7]]
    assert not found.grad_up.any() and not found.grad_down.any() and found.grad_hidden is None


def test_connected_texts():
    assert connected_texts(CHOSEN, REJECTED, 8).tolist() == COMPONENTS
    chain = torch.arange(50)
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert connected_texts(shuffled[chain[:-1]], shuffled[chain[1:]], 50).unique().tolist() == [0]


def test_what_has_no_tiles_is_refused(make_problem):
    problem = make_problem(1, lengths=LENGTHS)
    with pytest.raises(ValueError, match="no tiles"):
        head_log_probs_and_grads(*problem[:3], len(LENGTHS), *problem[3:6], pair_coefficient, impl="eager")
