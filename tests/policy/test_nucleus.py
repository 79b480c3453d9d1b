"""The nucleus is transformers' nucleus, found within the selection or beyond it."""

from __future__ import annotations

import pytest
import torch
from transformers import TopPLogitsWarper

from prefmix.policy import nucleus
from prefmix.policy.nucleus import NucleusWarper


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0], ids=["flat", "medium", "peaked"])
def test_equals_transformers(top_p, spread):
    scores = spread * torch.randn(6, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[1, 50:] = -torch.inf  # as top-k before it leaves them
    ids = torch.zeros(6, 1, dtype=torch.long)
    assert torch.equal(NucleusWarper(top_p)(ids, scores), TopPLogitsWarper(top_p)(ids, scores))


def test_every_width_is_reached_and_gives_the_same(monkeypatch):
    scores = torch.randn(4, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.zeros(4, 1, dtype=torch.long)
    expected = TopPLogitsWarper(0.7)(ids, scores)
    sizes = (expected > -torch.inf).sum(1)
    for widths in ((), (8,), (8, int(sizes.max()) + 1), (int(sizes.max()),)):
        monkeypatch.setattr(nucleus, "WIDTHS", widths)
        assert torch.equal(NucleusWarper(0.7)(ids, scores), expected)


def test_the_most_probable_token_stays():
    scores = torch.tensor([[0.0, 5.0, 1.0]])
    assert NucleusWarper(1e-6)(torch.zeros(1, 1, dtype=torch.long), scores).isfinite().tolist() == [
        [False, True, False]
    ]
