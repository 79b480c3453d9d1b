"""The shapes in signatures are checked while the tests run: without this, the annotations would be decoration."""

import pytest
import torch
from jaxtyping import TypeCheckError

from prefmix.mixture.bradley_terry import margins
from prefmix.mixture.posterior import posterior


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        posterior(torch.zeros(3, 2), torch.zeros(3, 4))


def test_wrong_types_are_refused():
    with pytest.raises(TypeCheckError):
        margins(torch.zeros(3, 2), torch.zeros(1), torch.zeros(1))
