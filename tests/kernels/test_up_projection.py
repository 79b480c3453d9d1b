"""B_k = W U_k and its gradient."""

from __future__ import annotations

import pytest
import torch

from prefmix.kernels import up_projection
from prefmix.kernels.up_projection import project_up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_matrix_product(dtype, monkeypatch):
    monkeypatch.setattr(up_projection, "_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 12, generator=generator).to(dtype)
    up = torch.randn(3, 12, 4, generator=generator).requires_grad_()
    grad = torch.randn(3, 50, 4, generator=generator)
    found, expected = project_up(weight, up), weight.float() @ up
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * grad).sum(), up), torch.autograd.grad((expected * grad).sum(), up)
    )
