"""Which rows of a gradient are not zero: a cheap M-step teaches few experts, and the others must cost nothing."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def rows_with_gradient(grad: Float[Tensor, "T K"]) -> Int[Tensor, "n"] | None:
    """The rows with an entry that is not zero (NaN counts), or None where that is every row.

    None keeps the dense path free of copies, and its numbers the same bit for bit.
    """
    # Where a row is used at all, almost every entry is: a few columns settle nearly all rows.
    used = (grad[:, :256] != 0).any(dim=1)
    if grad.shape[1] > 256 and not bool(used.all()):
        used = (grad != 0).any(dim=1)
    return None if bool(used.all()) else used.nonzero().squeeze(1)


def at_rows(part: Tensor, rows: Int[Tensor, "n"] | None, total: int, dim: int) -> Tensor:
    """Puts n rows back among `total` rows of zeros; `rows` None: there were all of them."""
    if rows is None:
        return part
    shape = [*part.shape]
    shape[dim] = total
    return part.new_zeros(shape).index_copy_(dim, rows, part)
