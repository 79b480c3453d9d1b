"""The growing cache holds what transformers' concatenating one holds."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from prefmix.experts.growing_cache import GrowingLayer, growing_cache


def test_layer_equals_the_concatenating_one_through_growth_and_selection() -> None:
    torch.manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()
    size = 6
    for step in range(90):
        new = [torch.randn(size, 2, 5 if step == 0 else 1, 3) for _ in range(2)]
        for a, b in zip(ours.update(*new), theirs.update(*new), strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
        if step in (3, 40, 41):
            kept = torch.randperm(size)[: size - 1]
            size -= 1
            for layer in (ours, theirs):
                layer.batch_select_indices(kept)
        if step == 60:  # somebody else changes the order
            for layer in (ours, theirs):
                layer.reorder_cache(torch.arange(size).flip(0))
        if step == 70:
            for layer in (ours, theirs):
                layer.crop(-2)
    assert ours.get_seq_length() == theirs.get_seq_length()
    torch.testing.assert_close(ours.values, theirs.values, atol=0, rtol=0)


def test_a_token_is_written_in_place() -> None:
    layer = GrowingLayer()
    layer.update(torch.randn(2, 1, 4, 3), torch.randn(2, 1, 4, 3))
    before = layer.keys.data_ptr()
    layer.update(torch.randn(2, 1, 1, 3), torch.randn(2, 1, 1, 3))
    assert layer.keys.data_ptr() == before and layer.keys.shape[-2] == 5


def test_every_full_attention_layer_grows(tiny_model: Any) -> None:
    assert [type(layer) for layer in growing_cache(tiny_model.config).layers] == [GrowingLayer] * 2
