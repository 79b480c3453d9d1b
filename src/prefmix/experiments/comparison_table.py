"""From the cells of a comparison to one table: figures with intervals, paired tests, the share of the gap, cost.

Legend: B rows over all seeds, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prefmix.evaluation.forest_plot import ForestLine, forest_svg
from prefmix.evaluation.metrics import ShareOfGap, expected_calibration_error, hits, share_of_gap_closed
from prefmix.evaluation.report import finite, plain_table
from prefmix.evaluation.two_way import TwoWay, two_way_bootstrap

SINGLE, ORACLE = "single DPO", "oracle"
HEADER = (
    "", "accuracy: population", "personalised [95%]", "worst group", "new users", "log-loss [95%]", "ECE",
    "accuracy - single (p)", "log-loss - single (p)", "gap closed", "CPU s", "memory, MiB",
)  # fmt: skip


class Line(NamedTuple):
    """One arm over all seeds.

    Attributes:
        name: of the arm.
        population: accuracy where nothing is known of the person.
        personalised: accuracy with what training taught of the person.
        worst_group: the lowest personalised accuracy over true groups; None without groups.
        new_users: context size -> accuracy for people whom training did not see.
        log_loss: personalised, nats.
        ece: personalised, mean over seeds.
        accuracy_gain: personalised accuracy minus single DPO's on the same rows; None for single DPO itself.
        log_loss_gain: the same of log-losses; negative is better.
        share: of the gap in accuracy from single DPO to the oracle; None without both.
        cpu_seconds: of one fit, mean over seeds.
        peak_mib: largest over seeds.
        extra_mib: largest over seeds, beyond what was resident before.
    """

    name: str
    population: TwoWay
    personalised: TwoWay
    worst_group: float | None
    new_users: Mapping[int, TwoWay]
    log_loss: TwoWay
    ece: float
    accuracy_gain: TwoWay | None
    log_loss_gain: TwoWay | None
    share: ShareOfGap | None
    cpu_seconds: float
    peak_mib: float
    extra_mib: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {
            name: value._asdict() if hasattr(value, "_asdict") else value for name, value in self._asdict().items()
        }
        return finite(values | {"new_users": {str(n): figure._asdict() for n, figure in self.new_users.items()}})


class _Rows(NamedTuple):
    """One way of predicting, rows of all seeds one after another."""

    hit: np.ndarray
    loss: np.ndarray
    logit: np.ndarray
    person: np.ndarray
    group: np.ndarray
    seed: np.ndarray


def comparison_lines(cells: Sequence[Mapping[str, Any]]) -> list[Line]:
    """One line an arm, in the order of the cells.

    Args:
        cells: of `run_comparison`; arms that lack a seed are compared on the seeds that they have.
    """
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for cell in cells:
        by_arm.setdefault(cell["arm"], {})[cell["seed"]] = cell
    single, oracle = by_arm.get(SINGLE), by_arm.get(ORACLE)
    return [_line(name, found, single, oracle) for name, found in by_arm.items()]


def table_text(lines: Sequence[Line]) -> str:
    """Plain text for a terminal."""
    return plain_table(HEADER, [_cells(line) for line in lines])


def table_markdown(lines: Sequence[Line]) -> str:
    """The same for a page."""
    rows = [HEADER, ["---"] * len(HEADER), *(_cells(line) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def picture(lines: Sequence[Line], title: str) -> str:
    """Personalised accuracy of every arm with its interval, and the population's as a ring; SVG."""
    return forest_svg(
        title,
        "held-out accuracy",
        [
            ForestLine(line.name, line.personalised.mean, line.personalised.low, line.personalised.high,
                       line.population.mean)
            for line in lines
        ],
        ("personalised, 95% over people and seeds", "population"),
    )  # fmt: skip


def legend(lines: Sequence[Line], cells: Sequence[Mapping[str, Any]]) -> str:
    """What the columns mean, in a few lines."""
    seeds = sorted({cell["seed"] for cell in cells})
    sizes = sorted({n for line in lines for n in line.new_users})
    of_new = f"new users: after {max(sizes)} of their comparisons, no training" if sizes else "no new users"
    how = cells[0]["memory"]["how"] if cells else ""
    return (
        f"seeds {', '.join(map(str, seeds))}; intervals and p from people and seeds resampled; "
        f"{of_new};\ngap closed: share of the way from single DPO's accuracy to the oracle's; CPU s: one fit at the "
        f"chosen options, cached states not\ncounted; memory: peak of the process (what the fit added), {how}"
    )


def _line(
    name: str,
    cells: Mapping[int, Mapping[str, Any]],
    single: Mapping[int, Mapping[str, Any]] | None,
    oracle: Mapping[int, Mapping[str, Any]] | None,
) -> Line:
    own, alike = _rows(cells, "personalised"), _rows(cells, "population")
    gains = None if single is None or name == SINGLE else _gains(cells, single)
    memory = [cell["memory"] for cell in cells.values()]
    return Line(
        name=name,
        population=two_way_bootstrap(alike.hit, alike.person, alike.seed),
        personalised=two_way_bootstrap(own.hit, own.person, own.seed),
        worst_group=_worst_group(own),
        new_users=_new_users(cells),
        log_loss=two_way_bootstrap(own.loss, own.person, own.seed),
        ece=float(np.mean([expected_calibration_error(own.logit[own.seed == seed]) for seed in cells])),
        accuracy_gain=gains[0] if gains else None,
        log_loss_gain=gains[1] if gains else None,
        share=None if name in (SINGLE, ORACLE) else _share(cells, single, oracle),
        cpu_seconds=float(np.mean([cell["cpu_seconds"] for cell in cells.values()])),
        peak_mib=max(entry["peak_mib"] for entry in memory),
        extra_mib=max(entry["extra_mib"] for entry in memory),
    )


def _rows(cells: Mapping[int, Mapping[str, Any]], way: str) -> _Rows:
    return _gathered([(seed, cell["test"], cell["test"][way]) for seed, cell in cells.items()])


def _gathered(parts: Sequence[tuple[int, Mapping[str, Any], Mapping[str, Any]]]) -> _Rows:
    logit = np.concatenate([np.array(numbers["logit"], dtype=np.float64) for _, _, numbers in parts])
    loss = -np.concatenate([np.array(numbers["log_prob"], dtype=np.float64) for _, _, numbers in parts])
    names = [user for _, people, _ in parts for user in people["user"]]
    index = {name: place for place, name in enumerate(dict.fromkeys(name for name in names if name is not None))}
    person = np.array([-1 if name is None else index[name] for name in names])
    groups = np.array([group if group is not None else "" for _, people, _ in parts for group in people["group"]])
    seed = np.repeat([seed for seed, _, _ in parts], [len(numbers["logit"]) for _, _, numbers in parts])
    return _Rows(hits(logit), loss, logit, person, groups, seed)


def _gains(cells: Mapping[int, Any], single: Mapping[int, Any]) -> tuple[TwoWay, TwoWay] | None:
    common = [seed for seed in cells if seed in single]
    if not common:
        return None
    own, other = (_rows({seed: of[seed] for seed in common}, "personalised") for of in (cells, single))
    differences = own.hit - other.hit, own.loss - other.loss
    hit, loss = (two_way_bootstrap(difference, own.person, own.seed) for difference in differences)
    return hit, loss


def _share(cells: Mapping[int, Any], single: Any, oracle: Any) -> ShareOfGap | None:
    if single is None or oracle is None:
        return None
    common = [seed for seed in cells if seed in single and seed in oracle]
    if not common:
        return None
    own, low, high = (_rows({seed: of[seed] for seed in common}, "personalised") for of in (cells, single, oracle))
    gap = two_way_bootstrap(high.hit - low.hit, low.person, low.seed)
    return share_of_gap_closed(float(own.hit.mean()), float(low.hit.mean()), float(high.hit.mean()), gap.se)


def _worst_group(rows: _Rows) -> float | None:
    groups = [group for group in np.unique(rows.group) if group]
    return min(float(rows.hit[rows.group == group].mean()) for group in groups) if groups else None


def _new_users(cells: Mapping[int, Mapping[str, Any]]) -> dict[int, TwoWay]:
    """Context sizes that all seeds can give."""
    parts = {seed: cell["new_users"] for seed, cell in cells.items() if cell["new_users"] is not None}
    if not parts:
        return {}
    sizes = sorted(set.intersection(*({int(n) for n in part["by_context"]} for part in parts.values())))
    found = {}
    for size in sizes:
        rows = _gathered([(seed, part, part["by_context"][str(size)]) for seed, part in parts.items()])
        found[size] = two_way_bootstrap(rows.hit, rows.person, rows.seed)
    return found


def _cells(line: Line) -> list[str]:
    new = line.new_users[max(line.new_users)].mean if line.new_users else None
    share = "" if line.share is None else "undefined" if line.share.share is None else f"{100 * line.share.share:.0f}%"
    return [
        line.name,
        f"{line.population.mean:.3f}",
        f"{line.personalised.mean:.3f} [{line.personalised.low:.3f}, {line.personalised.high:.3f}]",
        "" if line.worst_group is None else f"{line.worst_group:.3f}",
        "" if new is None else f"{new:.3f}",
        f"{line.log_loss.mean:.3f} [{line.log_loss.low:.3f}, {line.log_loss.high:.3f}]",
        f"{line.ece:.3f}",
        _gain(line.accuracy_gain),
        _gain(line.log_loss_gain),
        share,
        f"{line.cpu_seconds:.1f}",
        f"{line.peak_mib:.0f} (+{line.extra_mib:.0f})",
    ]


def _gain(gain: TwoWay | None) -> str:
    if gain is None:
        return ""
    return f"{gain.mean:+.3f}" + ("" if math.isnan(gain.p) else f" ({_p(gain.p)})")


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
