"""The trunk is called by the names that the installed transformers uses, without its warnings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from prefmix.experts.trunk import run_trunk


class Before(nn.Module):
    """A decoder that tells what it was given, by the older name."""

    def get_decoder(self) -> nn.Module:
        return self

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any = None, use_cache: Any = None
    ) -> Any:
        return past_key_values, use_cache


class After(Before):
    """By the newer one."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, use_cache: Any = None) -> Any:  # type: ignore[override]
        return cache, use_cache


@pytest.mark.parametrize("decoder", [Before(), After()])
def test_a_cache_arrives_by_the_name_that_the_decoder_has(decoder: Any) -> None:
    cache, ids = DynamicCache(), torch.zeros(1, 2, dtype=torch.int64)
    found, used = run_trunk(decoder, ids, torch.ones_like(ids), cache=cache)
    assert found is cache
    assert used is True
    assert run_trunk(decoder, ids, torch.ones_like(ids), use_cache=False) == (None, False)
