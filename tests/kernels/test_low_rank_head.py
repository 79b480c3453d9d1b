"""The chunked kernel against float64 with every logit materialised, on ragged texts and tiles that cut them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefmix.kernels.low_rank_head import head_log_probs
from prefmix.kernels.tiles import Tiles

# Tiles that cut both texts and vocabulary.
NUM_TEXTS, VOCAB = 5, 333
TILES = Tiles(tokens=16, vocab=100)


class Answer(NamedTuple):
    """Values and gradients in float64; grads by name."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]


def answer(problem: Any, impl: str, tiles: Tiles = TILES) -> Answer:
    leaves = {name: getattr(problem, name).clone().requires_grad_() for name in ("hidden", "down", "up")}
    result = head_log_probs(
        leaves["hidden"],
        problem.targets,
        problem.segments,
        int(problem.segments.max()) + 1,
        problem.base_weight,
        leaves["down"],
        leaves["up"],
        bias=problem.bias,
        impl=impl,
        tiles=tiles,
    )
    grads = torch.autograd.grad((result.log_probs * problem.grad).sum(), list(leaves.values()))
    values = {"log_probs": result.log_probs.detach().double(), "base": result.base_log_probs.double()}
    return Answer(values, {name: grad.double() for name, grad in zip(leaves, grads)})


def relative_errors(found: Answer, expected: Answer) -> dict[str, float]:
    pairs = [(found.values, expected.values), (found.grads, expected.grads)]
    return {name: float((f[name] - e[name]).norm() / e[name].norm()) for f, e in pairs for name in e}


@pytest.mark.parametrize("num_experts", [1, 2, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-13)])
def test_equals_float64_materialised(make_problem, num_experts, bias, dtype, limit):
    problem = make_problem(num_experts, dtype=dtype, bias=bias)
    if dtype == torch.float64:
        problem = problem.double()
    errors = relative_errors(answer(problem, "chunked"), answer(problem.double(), "eager"))
    assert max(errors.values()) < limit, errors


def test_corrections_too_large_for_the_base_maximum(make_problem):
    # Corrections of hundreds of nats: an expert that kept the base's maximum as its shift would overflow.
    problem = make_problem(correction=100.0)
    found, expected = answer(problem, "chunked"), answer(problem.double(), "eager")
    assert found.values["log_probs"].isfinite().all()
    assert relative_errors(found, expected)["log_probs"] < 1e-5
    assert max(relative_errors(found, expected).values()) < 1e-4
    double = problem.double()
    assert max(relative_errors(answer(double, "chunked"), answer(double, "eager")).values()) < 1e-12


def test_gradient_equals_finite_differences(make_problem):
    problem = make_problem(2).double()

    def log_probs(hidden: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return head_log_probs(
            hidden, problem.targets, problem.segments, NUM_TEXTS, problem.base_weight, down, up, tiles=TILES
        ).log_probs

    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.down, problem.up)]
    assert torch.autograd.gradcheck(log_probs, leaves, fast_mode=True)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    tokens=st.integers(1, 40),
    vocab=st.integers(1, 400),
    seed=st.integers(0, 1000),
)
def test_tiles_do_not_change_the_answer(make_problem, lengths, tokens, vocab, seed):
    problem = make_problem(2, lengths=lengths, seed=seed).double()
    errors = relative_errors(answer(problem, "chunked", Tiles(tokens, vocab)), answer(problem, "eager"))
    assert max(errors.values()) < 1e-11, errors


def test_segments_in_any_order(make_problem):
    problem = make_problem().double()
    order = torch.randperm(len(problem.targets), generator=torch.Generator().manual_seed(1))
    shuffled = problem._replace(
        hidden=problem.hidden[order], targets=problem.targets[order], segments=problem.segments[order]
    )
    found, expected = answer(shuffled, "chunked"), answer(problem, "eager")
    torch.testing.assert_close(found.values["log_probs"], expected.values["log_probs"])
    torch.testing.assert_close(found.grads["up"], expected.grads["up"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_correction_is_the_reference_bit_for_bit(make_problem, dtype):
    problem = make_problem(3, dtype=dtype)
    problem = problem._replace(up=torch.zeros_like(problem.up))
    values = answer(problem, "chunked").values
    assert torch.equal(values["log_probs"], values["base"][:, None].expand(-1, 3))


def test_no_experts_gives_the_reference_alone(make_problem):
    problem, with_experts = make_problem(0), make_problem(2)
    result = head_log_probs(*problem[:3], NUM_TEXTS, *problem[3:6], tiles=TILES)
    assert result.log_probs.shape == (NUM_TEXTS, 0)
    torch.testing.assert_close(result.base_log_probs.double(), answer(with_experts.double(), "eager").values["base"])


def test_probabilities_sum_to_one_over_a_tiny_vocabulary(make_problem):
    # Enumeration: one token, every target.
    vocab = len(make_problem().base_weight)
    problem = make_problem(2, lengths=[1] * vocab).double()
    problem = problem._replace(hidden=problem.hidden[:1].expand(vocab, -1), targets=torch.arange(vocab))
    values = answer(problem, "chunked").values
    torch.testing.assert_close(values["log_probs"].exp().sum(0), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(values["base"].exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_text_without_tokens_sums_to_zero(make_problem):
    """Token dropout leaves short texts without tokens, and zero is the sum over none."""
    problem = make_problem()
    result = head_log_probs(*problem[:3], NUM_TEXTS + 1, *problem[3:6])
    assert not result.log_probs[-1].any() and result.base_log_probs[-1] == 0
    assert (result.log_probs[:-1] < 0).all()


def test_gradients_that_nobody_asks_for_are_not_computed(make_problem):
    problem = make_problem()
    up = problem.up.clone().requires_grad_()
    result = head_log_probs(*problem[:3], NUM_TEXTS, problem.base_weight, problem.down, up, tiles=TILES)
    assert not result.base_log_probs.requires_grad
    (found,) = torch.autograd.grad((result.log_probs * problem.grad).sum(), [up])
    torch.testing.assert_close(found, answer(problem, "chunked").grads["up"].float())
    with torch.no_grad():
        result = head_log_probs(*problem[:3], NUM_TEXTS, problem.base_weight, problem.down, up, tiles=TILES)
    assert result.log_probs.grad_fn is None


def test_low_rank_part_stays_float32_under_autocast(make_problem):
    problem = make_problem()
    expected = answer(problem, "chunked").values["log_probs"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = answer(problem, "chunked").values["log_probs"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_memory_does_not_hold_the_logits(make_problem):
    # Without a budget a tile of [16, 100] must suffice: no tensor as large as [T, V] may be made.
    problem = make_problem(2)
    with torch.profiler.profile(profile_memory=True) as profile:
        answer(problem, "chunked", TILES._replace(kept_bytes=0))
    largest = max(
        event.cpu_memory_usage for event in profile.events() if event.name in ("aten::empty", "aten::resize_")
    )
    assert largest < 4 * len(problem.targets) * len(problem.base_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 20, 63])
def test_kept_logits_do_not_change_the_answer(make_problem, dtype, kept):
    """None, some (a part of the tokens goes each way) and all: the same products, only sums over parts differ."""
    problem = make_problem(2, dtype=dtype, bias=True)
    budget = kept * VOCAB * problem.base_weight.element_size()
    found, expected = answer(problem, "chunked", TILES._replace(kept_bytes=budget)), answer(problem, "chunked")
    assert max(relative_errors(found, expected).values()) < 1e-6


def test_kept_logits_serve_a_second_backward(make_problem):
    problem = make_problem(2)
    up = problem.up.clone().requires_grad_()
    result = head_log_probs(*problem[:3], NUM_TEXTS, problem.base_weight, problem.down, up, tiles=TILES)
    loss = (result.log_probs * problem.grad).sum()
    (first,) = torch.autograd.grad(loss, up, retain_graph=True)
    answer(problem, "chunked")  # another step, which must not write into what the first one kept
    assert torch.equal(first, torch.autograd.grad(loss, up)[0])
