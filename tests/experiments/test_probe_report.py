"""How the probe's groups are told to people."""

from __future__ import annotations

import numpy as np

from prefmix.experiments.probe_report import members_text


def test_users_stand_under_their_most_probable_group_the_surest_first_and_the_rest_are_counted() -> None:
    resp = np.array([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.7, 0.3, 0.0]])
    assert members_text(resp, ["anna", "bob", "carl", "dora"], shown=2).splitlines() == [
        "  expert 0, 3 people: bob 0.90, dora 0.70, and 1 more (--output lists all)",
        "  expert 1, 1 people: carl 0.80",
        "  expert 2, 0 people: -",
    ]
