"""The collator's worked example, and its batches against the table they were made from."""

from __future__ import annotations

import numpy as np
import torch

from prefmix.data.collator import ComparisonCollator, ComparisonDataset
from prefmix.data.comparisons import ComparisonTable, TextTable


def example_table() -> ComparisonTable:
    return ComparisonTable(
        texts=TextTable(
            prompt_ids=[[1, 2, 3], [1, 2, 3], [7, 8]],
            completion_ids=[[4, 5], [6], [9]],
            prompt_index=np.array([0, 0, 1]),
            prompts=[[1, 2, 3], [7, 8]],
        ),
        chosen=np.array([0, 1]),
        rejected=np.array([1, 0]),
        user=np.array([0, -1]),
        users=("anna",),
        weight=np.array([1.0, 0.5], dtype=np.float32),
        group=np.array([-1, -1]),
        groups=(),
        metadata=[{}, {}],
        source_row=np.array([0, 1]),
    )


def random_table(rng: np.random.Generator, texts: int, rows: int) -> ComparisonTable:
    prompts = [rng.integers(1, 99, size=rng.integers(1, 9)).tolist() for _ in range(4)]
    prompt_index = rng.integers(0, 4, size=texts)
    return ComparisonTable(
        texts=TextTable(
            prompt_ids=[prompts[i] for i in prompt_index],
            completion_ids=[rng.integers(1, 99, size=rng.integers(1, 13)).tolist() for _ in range(texts)],
            prompt_index=prompt_index,
            prompts=prompts,
        ),
        chosen=rng.integers(0, texts, size=rows),
        rejected=rng.integers(0, texts, size=rows),
        user=np.zeros(rows, dtype=np.int64),
        users=("u",),
        weight=rng.random(rows).astype(np.float32),
        group=np.full(rows, -1),
        groups=(),
        metadata=[{}] * rows,
        source_row=np.arange(rows),
    )


def assert_batches_equal(batch: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype, name
        assert torch.equal(batch[name], value), name


def test_the_worked_example_of_the_docstring():
    collator = ComparisonCollator(example_table(), group=np.array([0, 1]), pad_token_id=0)
    expected = {
        "row": torch.tensor([0, 1]),
        "chosen": torch.tensor([0, 1]),
        "rejected": torch.tensor([1, 0]),
        "text_ids": torch.tensor([0, 1]),
        "user": torch.tensor([0, -1]),
        "group": torch.tensor([0, 1]),
        "weight": torch.tensor([1.0, 0.5]),
        "prompt": torch.tensor([0, 0]),
        "input_ids": torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
        "completion_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]),
    }
    assert_batches_equal(collator([0, 1]), expected)


def test_padded_texts_are_those_of_the_table_each_once():
    rng = np.random.default_rng(0)
    table = random_table(rng, texts=20, rows=50)
    collator = ComparisonCollator(table, group=np.arange(50), pad_token_id=0)
    for _ in range(20):
        rows = rng.integers(0, 50, size=6)
        batch = collator(rows.tolist())
        ids = batch["text_ids"].numpy()
        assert len(set(ids.tolist())) == len(ids)
        assert np.array_equal(ids[batch["chosen"].numpy()], table.chosen[rows])
        assert np.array_equal(ids[batch["rejected"].numpy()], table.rejected[rows])
        assert np.array_equal(batch["prompt"].numpy(), table.prompt[rows])
        for i, text in enumerate(ids):
            tokens = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
            completion = batch["input_ids"][i][batch["completion_mask"][i].bool()].tolist()
            assert tokens == [*table.texts.prompt_ids[text], *table.texts.completion_ids[text]]
            assert completion == table.texts.completion_ids[text]


def test_states_stand_in_for_token_ids_and_prompt_states_and_metadata_follow_their_row():
    table = example_table()
    asked = []

    def states(text_ids: np.ndarray) -> dict[str, torch.Tensor]:
        asked.append(text_ids.tolist())
        return {"hidden": torch.zeros(3, 2), "targets": torch.tensor([4, 5, 6]), "segments": torch.tensor([0, 0, 1])}

    prompt_states = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    metadata = torch.tensor([[5.0], [6.0]])
    collator = ComparisonCollator(
        table, group=np.arange(2), pad_token_id=0, states=states, prompt_states=prompt_states, metadata=metadata
    )
    batch = collator([1])
    assert asked == [[0, 1]]
    assert "input_ids" not in batch
    assert batch["segments"].tolist() == [0, 0, 1]
    assert batch["prompt_states"].tolist() == [[1.0, 2.0]]
    assert batch["metadata"].tolist() == [[6.0]]


def test_copies_of_a_row_have_no_weight_and_cannot_be_taken_for_it():
    collator = ComparisonCollator(example_table(), group=np.array([0, 1]), pad_token_id=0, metadata=torch.eye(2))
    batch = collator([0, ~1, 1])
    assert batch["row"].tolist() == [0, -2, 1]
    assert batch["weight"].tolist() == [1.0, 0.0, 0.5]
    assert batch["weight"].dtype == torch.float32
    for name in ("chosen", "rejected", "user", "group", "prompt", "metadata"):
        assert batch[name][1].tolist() == batch[name][2].tolist(), name


def test_the_dataset_gives_positions():
    table = example_table()
    assert [ComparisonDataset(table)[i] for i in range(2)] == [0, 1]
    assert ComparisonDataset(table).latent_group.tolist() == [0, 1]
    loader = torch.utils.data.DataLoader(
        ComparisonDataset(table),
        batch_size=2,
        collate_fn=ComparisonCollator(table, group=np.array([0, 1]), pad_token_id=0),
    )
    assert next(iter(loader))["row"].tolist() == [0, 1]
