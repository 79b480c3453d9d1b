"""K full heads against float64 with every logit materialised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefmix.kernels.full_head import full_head_log_probs
from prefmix.kernels.tiles import Tiles


def values(weights: Tensor, hidden: Tensor, problem, impl: str) -> dict[str, Tensor]:
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    result = full_head_log_probs(
        hidden,
        problem.targets,
        problem.segments,
        len(problem.grad),
        problem.base_weight,
        weights,
        bias=problem.bias,
        impl=impl,
        tiles=Tiles(tokens=16, vocab=100),
    )
    grads = torch.autograd.grad((result.log_probs * problem.grad).sum(), [hidden, weights])
    named = {"log_probs": result.log_probs, "base": result.base_log_probs, "hidden": grads[0], "weights": grads[1]}
    return {name: x.detach().double() for name, x in named.items()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-13)])
def test_equals_float64_materialised(make_problem, dtype, limit, bias):
    problem = make_problem(3, dtype=dtype, bias=bias)
    problem = problem.double() if dtype == torch.float64 else problem
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, *problem.base_weight.shape, generator=generator)
    weights = problem.base_weight.to(torch.promote_types(dtype, torch.float32)) + 0.1 * noise
    # The product runs in the base's type, so in bfloat16 the reference sees the same rounded heads.
    rounded = weights.to(dtype).double()
    found = values(weights, problem.hidden, problem, "chunked")
    expected = values(rounded, problem.hidden.double(), problem.double(), "eager")
    errors = {name: float((found[name] - x).norm() / x.norm()) for name, x in expected.items()}
    assert max(errors.values()) < limit, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_the_base_are_the_reference_bit_for_bit(make_problem, dtype):
    problem = make_problem(2, dtype=dtype)
    copies = problem.base_weight.float().expand(2, -1, -1)
    found = values(copies, problem.hidden, problem, "chunked")
    assert torch.equal(found["log_probs"], found["base"][:, None].expand(-1, 2))


def test_one_head_is_cross_entropy(make_problem):
    problem = make_problem(1)
    weight = (problem.base_weight * 1.1)[None]
    found = values(weight, problem.hidden, problem, "chunked")
    loss = torch.nn.functional.cross_entropy(problem.hidden @ weight[0].T, problem.targets, reduction="none")
    expected = torch.zeros(len(problem.grad)).index_add(0, problem.segments, -loss)
    torch.testing.assert_close(found["log_probs"][:, 0].float(), expected)
