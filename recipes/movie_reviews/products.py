"""The weighted product of experts: which weights are written, under which names, and what lies between them.

    pi_{w,s}(y_t | y_<t)  proportional to  pi_ref prod_k (pi_k / pi_ref)^(s w_k),   sum_k w_k = 1

which is `generate(weights=w, decoder="product")` of the policy whose experts have strength s. With heads that add
delta_k to the reference's logits it is softmax(logits_ref + s sum_k w_k delta_k): one model, a soup, says the same
tokens for one head's cost. At s = 1 a blend is weak: where the delta_k have nothing in common, sum_k w_k delta_k is
||w||_2 times as long as each of them (0.58 times at the centre of three). So a strength t of the tables is
s = t / ||w||_2, which is t itself at the vertices, where the product is the specialist.

Legend: K experts, W weight vectors, E pairs of neighbours.
"""

from __future__ import annotations

import numpy as np

from prefmix.evaluation.pareto import simplex_grid


def product_grid(num: int, steps: int) -> np.ndarray:
    """[W, K] `simplex_grid` without its vertices, which are the specialists, and with its centre."""
    grid = simplex_grid(num, steps)
    centre = np.full(num, 1 / num)
    inside = grid[grid.max(axis=1) < 1]
    return inside if np.isclose(inside, centre).all(axis=1).any() else np.vstack([inside, centre])


def product_name(weights: np.ndarray) -> str:
    """Beginning of keys of arrays, for example `product/0.25-0.50-0.25`, weights in the order of objectives."""
    return f"product/{'-'.join(f'{w:.2f}' for w in weights)}"


def logit_scale(weights: np.ndarray, strength: float) -> float:
    """How much the weighted mean of corrections is multiplied, s = t / ||w||_2."""
    return strength / float(np.linalg.norm(weights))


def neighbours(grid: np.ndarray, steps: int) -> np.ndarray:
    """[E, 2] rows of a `simplex_grid` (and anything else) that differ by one step from one entry to another."""
    distance = np.abs(grid[:, None] - grid[None]).sum(axis=2)
    return np.argwhere(np.triu(np.isclose(distance, 2 / steps)))
