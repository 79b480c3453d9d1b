"""Cutting a range into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefmix.kernels.tiles import spans


@given(total=st.integers(0, 200), largest=st.integers(1, 50))
def test_spans_cover_the_range_in_pieces_of_like_size(total, largest):
    pieces = list(spans(total, largest))
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(total))
    assert all(piece.stop - piece.start <= largest for piece in pieces)
    assert len(pieces) == -(-total // largest)
