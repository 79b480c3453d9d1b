"""The one-pass frozen head against float64 with every logit materialised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefmix.kernels.frozen_head import frozen_head_log_probs
from prefmix.kernels.low_rank_head import head_log_probs
from prefmix.kernels.tiles import Tiles

TILES = Tiles(tokens=16, vocab=100)


def values(problem, impl: str) -> dict[str, Tensor]:
    hidden = problem.hidden.clone().requires_grad_()
    inputs = (hidden, problem.targets, problem.segments, len(problem.grad), problem.base_weight)
    log_probs = frozen_head_log_probs(*inputs, bias=problem.bias, impl=impl, tiles=TILES)
    (grad,) = torch.autograd.grad((log_probs * problem.grad[:, 0]).sum(), hidden)
    return {"log_probs": log_probs.detach().double(), "hidden": grad.double()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-13)])
def test_equals_float64_materialised(make_problem, dtype, limit, bias):
    problem = make_problem(1, dtype=dtype, bias=bias)
    problem = problem.double() if dtype == torch.float64 else problem
    found, expected = values(problem, "chunked"), values(problem.double(), "eager")
    errors = {name: float((found[name] - x).norm() / x.norm()) for name, x in expected.items()}
    assert max(errors.values()) < limit, errors


def test_logits_far_apart_neither_overflow_nor_vanish(make_problem):
    problem = make_problem(1)
    problem = problem._replace(base_weight=problem.base_weight * 300)
    found, expected = values(problem, "chunked"), values(problem.double(), "eager")
    assert all(x.isfinite().all() for x in found.values())
    torch.testing.assert_close(found["log_probs"], expected["log_probs"], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_value_does_not_depend_on_whether_a_gradient_is_wanted(make_problem, dtype):
    problem = make_problem(1, dtype=dtype)
    inputs = (problem.targets, problem.segments, len(problem.grad), problem.base_weight)
    without = frozen_head_log_probs(problem.hidden, *inputs, tiles=TILES)
    wanted = frozen_head_log_probs(problem.hidden.clone().requires_grad_(), *inputs, tiles=TILES)
    assert torch.equal(without, wanted.detach())


def test_equals_the_reference_of_the_low_rank_head(make_problem):
    problem = make_problem(2, bias=True)
    inputs = (problem.hidden, problem.targets, problem.segments, len(problem.grad), problem.base_weight)
    expected = head_log_probs(*inputs, problem.down, problem.up, bias=problem.bias).base_log_probs
    torch.testing.assert_close(frozen_head_log_probs(*inputs, bias=problem.bias), expected)
