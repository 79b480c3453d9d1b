"""First responsibilities: rows that sum to one, seeds that repeat, labels and clusters that are found."""

import pytest
import torch

from prefmix.mixture.initialization import kmeans_resp, label_resp, random_resp


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_random_rows_sum_to_one_differ_and_repeat():
    resp = random_resp(50, 3, _generator())
    torch.testing.assert_close(resp.sum(1), torch.ones(50))
    assert resp.std(0).min() > 0.1
    assert torch.equal(resp, random_resp(50, 3, _generator()))
    assert not torch.equal(resp, random_resp(50, 3, _generator(1)))


def test_labels_are_one_hot_and_unknown_ones_uniform():
    resp = label_resp(torch.tensor([1, -1, 0]), 2)
    assert torch.equal(resp, torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]))


def test_too_many_labels_are_named():
    with pytest.raises(ValueError, match="num_experts"):
        label_resp(torch.tensor([0, 2]), 2)


def test_kmeans_finds_separated_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    truth = torch.arange(60) % 3
    resp = kmeans_resp(centres[truth] + torch.randn(60, 2, generator=_generator()), 3, _generator())
    label = resp.argmax(1)
    assert torch.equal(label.unsqueeze(0) == label.unsqueeze(1), truth.unsqueeze(0) == truth.unsqueeze(1))
    assert set(resp.unique().tolist()) == {0.0, 1.0}
