"""Gradients with zeros: the kernels skip experts and tokens that nothing is to be learned from, and stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefmix.kernels.full_head import full_head_log_probs
from prefmix.kernels.low_rank_head import head_log_probs
from prefmix.kernels.sparsity import at_rows, rows_with_gradient
from prefmix.kernels.tiles import Tiles
from prefmix.kernels.up_projection import project_up

TILES = Tiles(tokens=16, vocab=100)
# [5 texts, 3 experts]: a text for nobody, an expert for nothing, a text for two experts.
PATTERNS = {
    "one expert a text": [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]],
    "nobody reads a text": [[1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]],
    "an expert without texts": [[1, 0, 0], [1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]],
    "nothing": [[0, 0, 0]] * 5,
}


def gradients(problem: Any, head: str, impl: str) -> list[Tensor]:
    leaves = [problem.hidden, problem.down, problem.up]
    if head == "full":
        leaves = [problem.hidden, problem.base_weight + torch.einsum("kvr,krd->kvd", problem.up, problem.down)]
    leaves = [x.clone().requires_grad_() for x in leaves]
    texts = (leaves[0], problem.targets, problem.segments, 5, problem.base_weight)
    function: Any = full_head_log_probs if head == "full" else head_log_probs
    result = function(*texts, *leaves[1:], bias=problem.bias, impl=impl, tiles=TILES)
    return list(torch.autograd.grad((result.log_probs * problem.grad).sum(), leaves))


@pytest.mark.parametrize("head", ["low rank", "full"])
@pytest.mark.parametrize("correction", [0.1, 100.0], ids=["shared maximum", "own maximum"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparse_gradients_are_exact(make_problem: Any, head: str, correction: float, pattern: str) -> None:
    problem = make_problem(correction=correction, bias=True).double()
    problem = problem._replace(grad=problem.grad * torch.tensor(PATTERNS[pattern]))
    for found, expected in zip(gradients(problem, head, "chunked"), gradients(problem, head, "eager"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


class Products(TorchDispatchMode):
    """Counts multiplications of matrix products (torch's own counter passes over products in place)."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            matrices = [x for x in args if isinstance(x, Tensor)][-2:]
            self.count += matrices[0].numel() * matrices[1].shape[1]
        return func(*args, **(kwargs or {}))


def backward_products(problem: Any, head: str, tiles: Tiles) -> int:
    """Multiplications of the backward pass alone, the gradient to the parameters only."""
    problem = problem._replace(hidden=problem.hidden.detach())
    leaves = [problem.down, problem.up]
    if head == "full":
        leaves = [problem.base_weight + torch.einsum("kvr,krd->kvd", problem.up, problem.down)]
    leaves = [x.clone().requires_grad_() for x in leaves]
    texts = (problem.hidden, problem.targets, problem.segments, 5, problem.base_weight)
    function: Any = full_head_log_probs if head == "full" else head_log_probs
    result = function(*texts, *leaves, impl="chunked", tiles=tiles)
    with Products() as products:
        torch.autograd.grad((result.log_probs * problem.grad).sum(), leaves)
    return products.count


@pytest.mark.parametrize("kept_bytes", [0, 2**20], ids=["nothing kept", "kept"])
@pytest.mark.parametrize("head", ["low rank", "full"])
def test_work_falls_with_what_is_learned(make_problem: Any, head: str, kept_bytes: int) -> None:
    problem = make_problem(lengths=[16] * 5)
    tokens, hidden = problem.hidden.shape
    (vocab, _), rank = problem.base_weight.shape, problem.down.shape[1]
    # Of one expert and all tokens: probabilities, gradient to A h, gradient to B; or logits and gradient to W.
    expert = 3 * tokens * vocab * rank if head == "low rank" else 2 * tokens * vocab * hidden
    # Base logits are computed again for the tokens that somebody learns from, unless the forward kept them.
    shared = tokens * vocab * hidden if head == "low rank" and not kept_bytes else 0
    patterns = {"all": [[1, 1, 1]] * 5, "one": [[0, 1, 0]] * 5, "none": [[0, 0, 0]] * 5}
    patterns["one for each of two texts"] = [[1, 0, 0], [0, 0, 1], *[[0, 0, 0]] * 3]
    share = {"all": 3 * expert + shared, "one": expert + shared, "none": 0}
    share["one for each of two texts"] = 2 * (expert + shared) // 5
    for name, pattern in patterns.items():
        sparse = problem._replace(grad=problem.grad * torch.tensor(pattern))
        assert backward_products(sparse, head, TILES._replace(kept_bytes=kept_bytes)) == share[name], name


def test_projections_of_experts_without_gradient_are_skipped() -> None:
    generator = torch.Generator().manual_seed(0)
    base, up = torch.randn(50, 8, generator=generator), torch.randn(3, 8, 2, generator=generator, requires_grad=True)
    grad = torch.randn(3, 50, 2, generator=generator) * torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    (found,) = torch.autograd.grad(project_up(base, up), up, grad)
    torch.testing.assert_close(found, torch.einsum("kvr,vd->kdr", grad, base))
    assert (found[1] == 0).all()


def test_rows_with_gradient() -> None:
    grad = torch.tensor([[0.0, 1.0], [0.0, 0.0], [float("nan"), 0.0]])
    rows = rows_with_gradient(grad)
    assert rows is not None and rows.tolist() == [0, 2]
    assert rows_with_gradient(grad[[0, 2]]) is None
    assert at_rows(torch.tensor([[5.0, 6.0]]), torch.tensor([1]), 3, dim=0).tolist() == [[0, 0], [5, 6], [0, 0]]
