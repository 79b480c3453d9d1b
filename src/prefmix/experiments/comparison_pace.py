"""How long the rest of a comparison takes, from the fits so far: only those that train experts count."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prefmix.experiments.arms import TRAINED, Arm


class Pace:
    """Counts fits, and says after the first one how long the others take.

    Attributes:
        left: trained fits that are still to come.
    """

    def __init__(self, fits: Sequence[Arm], say: Callable[[str], None]) -> None:
        """Takes the arm of every fit that is to come."""
        self.left = sum(arm.method in TRAINED for arm in fits)
        self._say, self._seconds = say, list[float]()

    def fitted(self, arm: Arm, seconds: float) -> None:
        """Takes note of a fit; linear rewards and the reference take no time beside trained experts."""
        if arm.method not in TRAINED:
            return
        self.left -= 1
        self._seconds.append(seconds)
        if len(self._seconds) == 1 and self.left:
            others = "the other one" if self.left == 1 else f"the other {self.left}"
            self._say(f"the first trained fit ({arm.name}) took {duration(seconds)}; {others}: {self.rest()}")

    def rest(self) -> str:
        """`about 12 min`; "" before a fit and after the last."""
        if not self._seconds or not self.left:
            return ""
        return f"about {duration(self.left * sum(self._seconds) / len(self._seconds))}"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `1 h 05 min`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
