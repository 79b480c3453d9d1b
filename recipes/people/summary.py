"""From cells to the figures, tables and pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import COUNTS
from figures import Sums, collect, interval

from prefmix.evaluation.plots import curve_svg

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
TITLES = {
    "single": "single DPO",
    "user": "`user`",
    "membership": "`membership`",
    "log_linear": "log-linear blend (PAL, LoRe, VPL)",
    "own": "a reward for each person",
}


def summarise(cells: Cells) -> dict[str, Any]:
    """Figures of one set.

    Args:
        cells: `true` and `shuffled` -> one cell of `cells.run_cell` for each seed.
    """
    found: dict[str, Any] = {"rows": [cell["rows"] for cell in cells["true"]]}
    found["cpu_seconds"] = {kind: sum(cell["cpu_seconds"] for cell in runs) for kind, runs in cells.items()}
    for kind, runs in cells.items():
        found[kind] = {method: _method(runs, method) for method in runs[0]["methods"]}
    found["new_people"] = _new_people(cells["true"])
    if len(cells["true"][0]["methods"]["single"]["ndcg"]):
        found["ranking"] = _ranking(cells["true"])
    return found


def _method(runs: Sequence[Mapping[str, Any]], method: str) -> dict[str, Any]:
    found: dict[str, Any] = {"about": [run["methods"][method]["about"] for run in runs]}
    for figure, name in (("loss", "log_loss"), ("hit", "accuracy")):
        found[name] = interval(_sums(runs, method, figure))._asdict()
        if method != "single":
            difference = interval(_difference(runs, method, "single", figure))
            found[f"{name}_minus_single"] = difference._asdict()
    if "log_linear" in runs[0]["methods"] and method in ("user", "membership"):
        found["log_loss_minus_log_linear"] = interval(_difference(runs, method, "log_linear", "loss"))._asdict()
    found["log_loss_by_seed"] = [float(run["methods"][method]["loss"].mean()) for run in runs]
    return found


def _sums(runs: Sequence[Mapping[str, Any]], method: str, figure: str, users: str = "user") -> Sums:
    return collect([(run["users"], _users(run, users), run["methods"][method][figure]) for run in runs])


def _difference(runs: Sequence[Mapping[str, Any]], first: str, second: str, figure: str, users: str = "user") -> Sums:
    return collect(
        [
            (run["users"], _users(run, users), run["methods"][first][figure] - run["methods"][second][figure])
            for run in runs
        ]
    )


def _users(run: Mapping[str, Any], name: str) -> np.ndarray:
    return run[name] if name in run else run["methods"]["single"][name]


def _new_people(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Log-loss for people nobody trained on, by the number of comparisons told; the same rows for every number."""
    found: dict[str, Any] = {"told": list(COUNTS)}
    for method in runs[0]["methods"]:
        found[method] = []
        for place in range(len(COUNTS)):
            loss = [run["methods"][method]["new_loss"][place] for run in runs]
            gain = [a - run["methods"]["single"]["new_loss"][place] for a, run in zip(loss, runs)]
            # New people differ from seed to seed; each stands under a name of its own.
            sums = collect(
                [
                    ([f"{seed}-{user}" for user in range(run["new_user"].max() + 1)], run["new_user"], value)
                    for seed, (run, value) in enumerate(zip(runs, gain))
                ]
            )
            entry = {"log_loss": float(np.concatenate(loss).mean())}
            if method != "single":
                entry["minus_single"] = interval(_one_seed(sums))._asdict()
            found[method].append(entry)
    return found


def _one_seed(sums: Sums) -> Sums:
    """All seeds' people as one sample: the people are different ones, so nothing is crossed."""
    return Sums(sums.total.sum(axis=0, keepdims=True), sums.count.sum(axis=0, keepdims=True))


def _ranking(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in runs[0]["methods"]:
        found[method] = {}
        for figure in ("ndcg", "top"):
            found[method][figure] = interval(_sums(runs, method, figure, "ranked_user"))._asdict()
            if method != "single":
                difference = _difference(runs, method, "single", figure, "ranked_user")
                found[method][f"{figure}_minus_single"] = interval(difference)._asdict()
    return found


def print_tables(report: Mapping[str, Any]) -> None:
    """Markdown tables of everything."""
    for name, found in report["sets"].items():
        print(f"\n### {name}\n\nrows by seed: {found['rows']}\n")
        print("| ids | method | log-loss | accuracy | log-loss minus single | p | accuracy minus single, points |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for kind in ("true", "shuffled"):
            for method, figures in found[kind].items():
                print(f"| {kind} | {TITLES[method]} | {_line(figures)} |")
        print("\n| told | " + " | ".join(map(str, COUNTS)) + " |\n| --- |" + " --- |" * len(COUNTS))
        for method, entries in found["new_people"].items():
            if method != "told":
                cells = [f"{entry['log_loss']:.3f}" + _star(entry.get("minus_single")) for entry in entries]
                print(f"| {TITLES[method]} | {' | '.join(cells)} |")
        if "ranking" in found:
            print("\n| ranking held-out things | NDCG@10 | minus single | first is liked | minus single |")
            print("| --- |" + " --- |" * 4)
        for method, figures in found.get("ranking", {}).items():
            shown = [_with_interval(figures[figure]) for figure in ("ndcg", "top")]
            gains = [_with_interval(figures.get(f"{figure}_minus_single")) for figure in ("ndcg", "top")]
            print(f"| {TITLES[method]} | {shown[0]} | {gains[0]} | {shown[1]} | {gains[1]} |")


def pictures(report: Mapping[str, Any], folder: Path) -> None:
    """One picture a set: log-loss for new people by what is told of them."""
    for name, found in report["sets"].items():
        curves = {
            TITLES[method].strip("`"): [(float(n), e["log_loss"]) for n, e in zip(COUNTS, entries)]
            for method, entries in found["new_people"].items()
            if method != "told"
        }
        title = f"{name}: people nobody trained on"
        svg = curve_svg(title, "comparisons told", "log-loss, nats", curves)
        (folder / f"{name}-new-people.svg").write_text(svg, encoding="utf-8")


def _line(figures: Mapping[str, Any]) -> str:
    gain, points = figures.get("log_loss_minus_single"), figures.get("accuracy_minus_single")
    cells = [f"{figures['log_loss']['mean']:.4f}", f"{figures['accuracy']['mean']:.4f}"]
    if gain is None or points is None:
        return " | ".join([*cells, "", "", ""])
    cells += [_with_interval(gain), f"{gain['p_bootstrap']:.4f} / {gain['p_signs']:.4f}"]
    return " | ".join([*cells, _with_interval({k: 100 * v for k, v in points.items()}, 2)])


def _with_interval(value: Mapping[str, float] | None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _star(gain: Mapping[str, float] | None) -> str:
    return "*" if gain is not None and (gain["low"] > 0 or gain["high"] < 0) else ""
