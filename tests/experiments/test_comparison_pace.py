"""The rest of a comparison is the mean trained fit times those to come."""

from __future__ import annotations

from prefmix.experiments.arms import all_arms
from prefmix.experiments.comparison_pace import Pace, duration


def test_the_first_trained_fit_says_how_long_the_others_take() -> None:
    arms, said = all_arms(), list[str]()
    pace = Pace([arms["reference"], *[arms["mixture"]] * 4], said.append)
    pace.fitted(arms["reference"], 0.0)
    assert (pace.left, pace.rest(), said) == (4, "", [])
    pace.fitted(arms["mixture"], 60.0)
    assert said == ["the first trained fit (mixture) took 60 s; the other 3: about 3 min"]
    pace.fitted(arms["mixture"], 120.0)
    assert pace.rest() == "about 3 min" and len(said) == 1
    pace.fitted(arms["mixture"], 1.0)
    pace.fitted(arms["mixture"], 1.0)
    assert pace.rest() == ""


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.2, 89, 91, 3900, 7500)] == [
        "1 s",
        "89 s",
        "2 min",
        "65 min",
        "2 h 05 min",
    ]
