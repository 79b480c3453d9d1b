"""The temperature path."""

import pytest

from prefmix.mixture.schedule import temperature


def test_ends_middle_and_outside():
    assert temperature(0.0, 4.0, 1.0) == 4.0
    assert temperature(0.5, 4.0, 1.0) == pytest.approx(2.0)
    assert temperature(1.0, 4.0, 1.0) == 1.0
    assert temperature(7.0, 4.0, 1.0) == 1.0 and temperature(-1.0, 4.0, 1.0) == 4.0
