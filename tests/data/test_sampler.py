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


LENGTHS = np.random.default_rng(1).integers(10, 200, size=200)


def padding(order: list[int], lengths: np.ndarray, size: int = 8) -> int:
    """Tokens that fill batches of `size` up to their longest row."""
    batches = [lengths[order[start : start + size]] for start in range(0, len(order), size)]
    return sum(int((batch.max() - batch).sum()) for batch in batches)


@pytest.mark.parametrize("num_prompts", [2000, 7])
def test_batches_of_like_length_hold_every_row_and_pad_less(num_prompts):
    rng = np.random.default_rng(0)
    prompt, lengths = rng.permutation(np.arange(2000) % num_prompts), rng.integers(10, 200, size=2000)
    order = list(PromptGroupedSampler(prompt, block_size=8, lengths=lengths))
    assert sorted(order) == list(range(2000))
    plain = list(PromptGroupedSampler(prompt, block_size=8))
    assert padding(order, lengths) < 0.4 * padding(plain, lengths)
    changes = int((np.diff(prompt[order]) != 0).sum())
    assert num_prompts == 2000 or changes < 400  # 250 batches, some of whose borders are within a block


def test_blocks_of_one_prompt_stay_together_when_sorted_by_length():
    prompt = np.repeat(np.arange(50), 4)
    order = np.array(list(PromptGroupedSampler(prompt, block_size=4, lengths=LENGTHS)))
    assert (prompt[order].reshape(50, 4) == prompt[order].reshape(50, 4)[:, :1]).all()


def test_batches_of_like_length_are_shuffled_and_differ_from_epoch_to_epoch():
    sampler = PromptGroupedSampler(np.arange(200), block_size=8, seed=1, lengths=LENGTHS)
    first = np.array(list(sampler)).reshape(-1, 8)
    means = LENGTHS[first].mean(1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5  # neither longest first nor shortest first
    assert list(first.ravel()) == list(PromptGroupedSampler(np.arange(200), block_size=8, seed=1, lengths=LENGTHS))
    sampler.set_epoch(1)
    second = np.array(list(sampler)).reshape(-1, 8)
    kept = {frozenset(batch) for batch in first.tolist()} & {frozenset(batch) for batch in second.tolist()}
    assert len(kept) < 3  # other batches, not the same ones in another order


def test_the_rest_and_the_copies_come_last():
    sampler = PromptGroupedSampler(np.arange(203), block_size=8, lengths=np.arange(203), multiple_of=16)
    order = list(sampler)
    assert len(order) == len(sampler) == 208
    assert sorted(order[:203]) == list(range(203)) and order[203:] == [~order[202]] * 5


def test_equal_lengths_leave_the_order_as_it_is():
    plain = list(PromptGroupedSampler(PROMPT, block_size=8, seed=3))
    assert list(PromptGroupedSampler(PROMPT, block_size=8, seed=3, lengths=np.full(200, 7))) == plain
