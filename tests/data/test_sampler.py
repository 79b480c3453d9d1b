"""Orders of an epoch: complete, grouped, reproducible, different from epoch to epoch."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from prefmix.data.sampler import PromptGroupedSampler

PROMPT = np.random.default_rng(0).integers(0, 7, size=200)


def test_every_row_comes_once_an_epoch():
    assert sorted(PromptGroupedSampler(PROMPT, block_size=8, seed=3)) == list(range(200))
    assert len(PromptGroupedSampler(PROMPT, block_size=8)) == 200


def test_rows_come_in_blocks_of_one_prompt_that_no_prompt_dominates():
    order = list(PromptGroupedSampler(PROMPT, block_size=8, seed=3))
    changes = int((np.diff(PROMPT[order]) != 0).sum())
    blocks = sum(int(np.ceil(count / 8)) for count in np.bincount(PROMPT))
    assert changes < blocks  # a change of prompt at most between two blocks
    assert changes > 7  # and not one run for each prompt


def test_small_prompts_stay_whole():
    prompt = np.repeat(np.arange(50), 3)
    order = np.array(list(PromptGroupedSampler(prompt, block_size=4)))
    assert (prompt[order].reshape(50, 3) == prompt[order].reshape(50, 3)[:, :1]).all()


def test_the_order_depends_on_seed_and_epoch_alone():
    first, second = (PromptGroupedSampler(PROMPT, block_size=8, seed=1) for _ in range(2))
    list(islice(iter(first), 13))  # an epoch that was broken off leaves no trace
    assert list(first) == list(second)
    second.set_epoch(1)
    assert list(first) != list(second)
    first.set_epoch(1)
    assert list(first) == list(second)
    assert list(PromptGroupedSampler(PROMPT, block_size=8, seed=2)) != list(PromptGroupedSampler(PROMPT, block_size=8))


def test_copies_fill_the_last_round_of_batches():
    plain = list(PromptGroupedSampler(PROMPT, block_size=16, seed=3))
    sampler = PromptGroupedSampler(PROMPT, block_size=16, seed=3, multiple_of=48)
    filled = list(sampler)
    assert len(filled) == len(sampler) == 240
    assert filled[:200] == plain
    assert filled[200:] == [~plain[-1]] * 40
    assert list(PromptGroupedSampler(PROMPT, block_size=16, seed=3, multiple_of=50)) == plain


def test_a_block_needs_a_row():
    with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
        PromptGroupedSampler(PROMPT, block_size=0)
