"""The recipe's tables and pictures, from arrays and records of all seeds. Legend: S strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fronts import (
    FRONTS,
    SeedArrays,
    common_kl,
    gains_at_kl,
    hypervolumes,
    share_of_oracle,
    simplex_grid,
    volumes_from_halves,
)
from products import product_grid

from prefmix.evaluation.generation_quality import Frontier, win_rate
from prefmix.evaluation.intervals import Interval, nested_bootstrap
from prefmix.evaluation.plots import ScatterPoint, scatter_svg
from prefmix.evaluation.report import plain_table


def figures(seeds: Sequence[SeedArrays], rewards: Sequence[str], bootstraps: int) -> dict[str, Any]:
    """Everything that is claimed, JSON values."""
    kl, whole = common_kl(seeds), seeds[0].whole
    methods = ("mixture", "mixture, fixed weights", "anonymous mixture") if whole else ("mixture",)
    found = {
        "kl": kl,
        "gains_at_equal_kl": {f"{x:g}": gains_at_kl(seeds, x, bootstraps) for x in (kl / 2, kl)},
        "share_of_oracle": {method: share_of_oracle(seeds, method, bootstraps) for method in methods},
        "win_rates": win_rates(seeds),
        "means": means(seeds, rewards),
    }
    if whole:
        found |= {
            "hypervolume": {f"{x:g}": hypervolumes(seeds, x, bootstraps) for x in (kl / 2, kl)},
            "hypervolume_from_halves": {f"{x:g}": volumes_from_halves(seeds, x) for x in (kl / 2, kl)},
            "decoding_check": decoding_check(seeds),
        }
    return _plain(found)  # type: ignore[no-any-return]


def means(seeds: Sequence[SeedArrays], rewards: Sequence[str]) -> dict[str, dict[str, float]]:
    """Policy -> its KL and mean rewards in their own units, over prompts and seeds."""
    found = {}
    for name in policies(seeds):
        columns = np.mean([s.arrays[f"{name}/rewards"].mean(axis=0) for s in seeds], axis=0)
        kl = float(np.mean([s.kl(name).mean() for s in seeds]))
        found[name] = {"KL": round(kl, 3)} | {r: round(float(c), 3) for r, c in zip(rewards, columns, strict=True)}
    return found


def policies(seeds: Sequence[SeedArrays]) -> list[str]:
    """Names of all that wrote in every seed."""
    names = [key.removesuffix("/rewards") for key in seeds[0].arrays if key.endswith("/rewards")]
    return [name for name in names if all(f"{name}/rewards" in s.arrays for s in seeds)]


def win_rates(seeds: Sequence[SeedArrays]) -> dict[str, dict[str, Any]]:
    """Objective -> how often the specialist's response has more of it than the reference's, or single DPO's.

    Single DPO at the strength whose KL is nearest to the specialist's.
    """
    found: dict[str, dict[str, Any]] = {}
    for objective in seeds[0].judged:
        index = seeds[0].objectives.index(objective)
        mine, reference, single = ([] for _ in range(3))
        for s in seeds:
            name = f"mixture/{objective}/1"
            rivals = s.written("single/all")
            nearest = min(rivals, key=lambda rival: abs(s.kl(rival).mean() - s.kl(name).mean()))
            for column, key in zip((mine, reference, single), (name, "reference", nearest), strict=True):
                column.append(s.arrays[f"{key}/rewards"][:, index].reshape(-1, s.each))
        own = np.concatenate(mine)
        found[objective] = {
            "against the reference": win_rate(own, np.concatenate(reference)),
            "against single DPO": win_rate(own, np.concatenate(single)),
        }
    return found


def decoding_check(seeds: Sequence[SeedArrays]) -> dict[str, Interval]:
    """`generate(weights=equal, decoder="mixture")` itself minus what its experts' samples say; zero in truth."""
    num = len(seeds[0].objectives)
    expected = [s.mixture(np.full(num, 1 / num)) for s in seeds]
    place = [list(s.strengths).index(1.0) + 1 for s in seeds]

    def statistic(draws: Sequence[Any]) -> np.ndarray:
        rows = []
        for d in draws:
            s, family, at = seeds[d.group], expected[d.group].drawn(d.members), place[d.group]
            rewards = s.rewards("equal")[d.members].mean(axis=0) - family.rewards[at].mean(axis=0)
            rows.append([s.kl("equal")[d.members].mean() - family.mean_kl[at], *rewards[:num]])
        found: np.ndarray = np.mean(rows, axis=0)
        return found

    sizes = [len(s.rewards("reference")) for s in seeds]
    return dict(zip(["KL", *seeds[0].objectives], nested_bootstrap(statistic, sizes), strict=True))


def tables_text(results: Mapping[str, Any]) -> str:
    """Plain text: the headline tables."""
    found, parts = results["figures"], []
    for kl, table in found["gains_at_equal_kl"].items():
        whole = table.get("mean of objectives")
        columns = ("mixture", "single DPO", "difference")
        rows = [[o, *(_cell(row[c]) for c in columns)] for o, row in table.items() if row is not whole]
        parts.append(f"gain over the reference at KL = {kl} nats, in its standard deviations")
        parts.append(plain_table(["objective", "mixture, weights on it", *columns[1:]], rows))
        if whole is not None:
            cells = [_cell(whole[c]) for c in FRONTS]
            parts.append(plain_table(["equal weights", *FRONTS], [["mean of objectives", *cells]]))
    for kl, table in found.get("hypervolume", {}).items():
        rows = [[corner, *(_cell(row[c]) for c in FRONTS)] for corner, row in table.items()]
        parts.append(f"hypervolume within KL = {kl} nats, weights swept")
        parts.append(plain_table(["corner", *FRONTS], rows))
    for method, table in found["share_of_oracle"].items():
        rows = [
            [
                o,
                *(
                    _cell(row[c])
                    for c in ("share", "share at the oracle's KL", "gain", "oracle gain", "KL", "oracle KL")
                ),
            ]
            for o, row in table.items()
        ]
        parts.append(f"{method}: share of the way from reference to oracle")
        parts.append(
            plain_table(["objective", "share", "share at its KL", "gain", "oracle's gain", "KL", "oracle's KL"], rows)
        )
    header = ["policy", *next(iter(found["means"].values()))]
    parts.append(plain_table(header, [[name, *map(str, row.values())] for name, row in found["means"].items()]))
    return "\n".join(parts)


def write_pictures(seeds: Sequence[SeedArrays], results: Mapping[str, Any], output: Path) -> None:
    """Beside the JSON: each objective against KL, and the front of every two objectives at equal KL."""
    kl = results["figures"]["kl"]
    for objective in seeds[0].judged:
        index = seeds[0].objectives.index(objective)
        points = []
        for series, families in (
            ("single DPO", [s.single() for s in seeds]),
            ("mixture, weights on it", [s.specialist(objective) for s in seeds]),
        ):
            for i, strength in enumerate(seeds[0].strengths[: min(len(f.kl) for f in families) - 1], start=1):
                gains = [(f.rewards[i] - f.rewards[0])[:, index] for f in families]
                y, half = (
                    float(np.mean(gains)),
                    1.96 * float(np.std(np.concatenate(gains))) / sum(map(len, gains)) ** 0.5,
                )
                x = float(np.mean([f.mean_kl[i] for f in families]))
                points.append(ScatterPoint(series, f"{strength:g}", max(x, 1e-3), y, y - half, y + half))
        _write(
            output,
            objective,
            scatter_svg(
                f"{objective} against KL",
                "sequence KL from the reference, nats (logarithmic)",
                f"gain in {objective}, standard deviations of the reference",
                points,
            ),
        )
    for first in range(len(seeds[0].objectives) if seeds[0].whole else 0):
        _front_picture(seeds, kl, first, (first + 1) % len(seeds[0].objectives), output)


def _front_picture(seeds: Sequence[SeedArrays], kl: float, first: int, second: int, output: Path) -> None:
    """Two objectives at equal KL: weights between two specialists, mixed and multiplied; single DPO's curve."""
    names, num, points = seeds[0].objectives, len(seeds[0].objectives), []

    def add(series: str, label: str, families: Sequence[Frontier], at: float) -> None:
        gains = [f.at_kl(at) - f.rewards[0].mean(axis=0) for f in families]
        x, y = (float(np.mean([g[i] for g in gains])) for i in (first, second))
        points.append(ScatterPoint(series, label, x, y, y, y))

    for weight in simplex_grid(2, 8)[:, 0]:
        weights = np.zeros(num)
        weights[[first, second]] = weight, 1 - weight
        label = names[first] if weight == 1 else names[second] if weight == 0 else ""
        add("mixture", label, [s.mixture(weights) for s in seeds], kl)
    others = [k for k in range(num) if k not in (first, second)]
    for weights in product_grid(num, seeds[0].product_steps):
        if not weights[others].any():
            add("product of experts", "", [s.product(weights) for s in seeds], kl)
    for part in np.linspace(0, kl, 6):
        add("single DPO", f"{part:g}", [s.single() for s in seeds], part)
    title = f"{names[first]} and {names[second]} at KL up to {kl:g} nats"
    labels = [f"gain in {names[i]}, standard deviations" for i in (first, second)]
    _write(output, f"{names[first]}-{names[second]}", scatter_svg(title, *labels, points, logarithmic=False))


def _write(output: Path, name: str, svg: str) -> None:
    output.with_name(f"{output.stem}-{name.replace(' ', '-')}.svg").write_text(svg, encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None or value["value"] is None:
        return ""
    if value["low"] is None:
        return f"{value['value']:.2f}"
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _plain(value: Any) -> Any:
    """NamedTuples as dictionaries, numbers rounded."""
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, float):
        return round(float(value), 4) if np.isfinite(value) else None
    return value
