"""What a diagnosis says: for each check what was seen, how much of it, and what to do about it. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Level = Literal["fine", "note", "warning"]
_MARK = {"fine": "ok  ", "note": "note", "warning": "WARN"}


class Finding(NamedTuple):
    """One check.

    Attributes:
        check: its name.
        level: `warning`: expect trouble; `note`: know this; `fine`.
        what: what was seen, in a sentence with the numbers.
        how_much: the numbers.
        remedy: what to do; empty where nothing is to be done.
    """

    check: str
    level: Level
    what: str
    how_much: dict[str, float]
    remedy: str = ""


class Diagnosis(NamedTuple):
    """All checks.

    Attributes:
        source: what was looked at.
        findings: in the order of the checks.
    """

    source: str
    findings: Sequence[Finding]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; numbers that do not exist are null."""
        entries = [finding._asdict() for finding in self.findings]
        for entry in entries:
            entry["how_much"] = {k: float(v) if math.isfinite(v) else None for k, v in entry["how_much"].items()}
        return {"source": self.source, "findings": entries}

    def text(self) -> str:
        """For a terminal: warnings first, then notes, then what is fine."""
        warnings = sum(finding.level == "warning" for finding in self.findings)
        return "\n".join([f"{self.source}: {warnings} warning{'' if warnings == 1 else 's'}", *self.lines()])

    def lines(self) -> list[str]:
        """Each finding, warnings first, and its remedy where there is something to mend."""
        lines = []
        for finding in sorted(self.findings, key=lambda f: ("warning", "note", "fine").index(f.level)):
            lines.append(f"{_MARK[finding.level]}  {finding.check}: {finding.what}")
            if finding.remedy and finding.level != "fine":
                lines.append(f"      -> {finding.remedy}")
        return lines
