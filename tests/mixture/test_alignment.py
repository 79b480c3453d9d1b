"""The assignment against scipy's and against all permutations; restarts get their reference's names."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from prefmix.mixture.alignment import align, assign


@given(size=st.integers(1, 12), seed=st.integers(0, 2**20), integers=st.booleans())
def test_the_sum_is_scipys(size, seed, integers):
    rng = np.random.default_rng(seed)
    score = rng.integers(-2, 3, (size, size)).astype(float) if integers else rng.normal(size=(size, size))
    order = assign(torch.tensor(score)).numpy()
    assert sorted(order) == list(range(size))
    best = score[linear_sum_assignment(score, maximize=True)].sum()
    assert score[np.arange(size), order].sum() == pytest.approx(best, abs=1e-9)


def test_no_permutation_is_better():
    score = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    best = max(sum(score[k, j].item() for k, j in enumerate(p)) for p in itertools.permutations(range(5)))
    assert score[torch.arange(5), assign(score)].sum().item() == pytest.approx(best, abs=1e-5)


def test_permuted_restarts_come_back():
    log_resp = torch.log_softmax(3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    orders = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2], [1, 2, 3, 0]])
    found = align(torch.stack([log_resp[:, order] for order in orders]), log_resp)
    torch.testing.assert_close(found.log_resp, log_resp.expand(3, -1, -1))
    for order, back in zip(orders, found.order, strict=True):
        assert torch.equal(order[back], torch.arange(4))
    torch.testing.assert_close(found.overlap, log_resp.exp().square().sum(1).mean().expand(3))


def test_sure_restarts_that_agree_overlap_wholly():
    log_resp = torch.eye(3)[torch.arange(9) % 3].log()
    assert align(log_resp[:, [2, 0, 1]][None], log_resp).overlap.tolist() == pytest.approx([1.0])
