"""Low-rank heads in hidden space as low-rank heads in logit space: B_k = W U_k.

Legend: K experts, D hidden, V vocabulary, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.kernels.sparsity import at_rows, rows_with_gradient
from prefmix.kernels.tiles import accumulation_dtype, spans

# Rows of W that are multiplied (and, in half precision, held in float32) at once; more make the product slower.
_ROWS = 1024


def project_up(base_weight: Float[Tensor, "V D"], up: Float[Tensor, "K D r"]) -> Float[Tensor, "K V r"]:
    """B_k = W U_k in float32 (float64 where U is), so that W (h + U_k A_k h) = W h + B_k (A_k h).

    Computed once a step, this lets one base product serve all experts. Gradients flow to U, not to the frozen W.

    Args:
        base_weight: [V, D] W, in any type; only a few thousand rows at a time are held in float32.
        up: [K, D, r] U_k.

    Returns:
        [K, V, r], laid out as [K, r, V].
    """
    num_experts, hidden, rank = up.shape
    rows = up.transpose(1, 2).reshape(num_experts * rank, hidden)
    with torch.autocast(up.device.type, enabled=False):
        projected = _ProjectRows.apply(rows.to(accumulation_dtype(up.dtype)), base_weight)
    return projected.view(num_experts, rank, len(base_weight)).transpose(1, 2)


class _ProjectRows(torch.autograd.Function):
    """rows W^T, with W cast piece by piece."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, base_weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(base_weight)
        out = rows.new_empty(len(rows), len(base_weight))
        for vocab in spans(len(base_weight), _ROWS):
            out[:, vocab] = rows @ base_weight[vocab].to(rows.dtype).T
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (base_weight,) = ctx.saved_tensors
        learned = rows_with_gradient(grad)
        part = grad if learned is None else grad[learned]
        out = grad.new_zeros(len(part), base_weight.shape[1])
        for vocab in spans(len(base_weight), _ROWS):
            out.addmm_(part[:, vocab], base_weight[vocab].to(grad.dtype))
        return at_rows(out, learned, len(grad), dim=0), None
