"""The tables of the recipe, from its JSON file alone."""

from __future__ import annotations

import math
from collections import defaultdict

Cells = dict[str, dict[str, float]]


def print_tables(found: Cells) -> None:
    """Prints every part that has cells."""
    groups: dict[str, dict[tuple[int, ...], list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for key, cell in found.items():
        fields = dict(part.split("=") for part in key.split())
        name = fields.pop("part")
        fields.pop("seed")
        groups[name][tuple(int(value) for value in fields.values())].append(cell)
    if "opposed" in groups:
        _opposed(groups["opposed"])
    if "recovery" in groups:
        for title, value in RECOVERY.items():
            _recovery(groups["recovery"], title, value)
    for part in ("restarts", "hard_restarts"):
        if part in groups:
            _restarts(part.replace("_", " "), groups[part][()])


def interval(values: list[float], digits: int = 3) -> str:
    """Mean and half-width of its 95% interval (normal)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.{digits}f} ± {1.96 * spread / math.sqrt(len(values)):.{digits}f}"


def share_of_gap(cells: list[dict[str, float]]) -> str:
    """(mixture - single) / (Bayes rule - single) in accuracy, of the means over seeds: one seed's gap may be zero."""
    single, mixture, bayes = (
        sum(cell[f"{arm}_accuracy"] for cell in cells) / len(cells) for arm in ("single", "mixture", "bayes")
    )
    # With one taste the mixture is the single expert, and its distance from the truth is estimation error.
    return f"{(mixture - single) / (bayes - single):.2f}" if bayes - single > 0.005 and mixture != single else "-"


RECOVERY = {
    "share of the oracle's gap closed": share_of_gap,
    "ARI": lambda cells: interval([cell["ari"] for cell in cells], 2),
    "held-out evidence, mixture minus truth, nats a row": lambda cells: interval(
        [cell["mixture_evidence"] - cell["bayes_evidence"] for cell in cells]
    ),
    "held-out evidence, mixture minus one expert, nats a row": lambda cells: interval(
        [cell["mixture_evidence"] - cell["single_evidence"] for cell in cells]
    ),
}


def _opposed(groups: dict[tuple[int, ...], list[dict[str, float]]]) -> None:
    print("\n| comparisons a user | seeds | Bayes rule | mixture | difference, points | largest | single DPO |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (each,), cells in sorted(groups.items()):
        gaps = [100 * (cell["bayes_accuracy"] - cell["mixture_accuracy"]) for cell in cells]
        arms = [interval([cell[f"{arm}_accuracy"] for cell in cells]) for arm in ("bayes", "mixture", "single")]
        print(f"| {each} | {len(cells)} | {arms[0]} | {arms[1]} | {interval(gaps, 2)} | {max(gaps):.2f} | {arms[2]} |")


def _recovery(groups: dict[tuple[int, ...], list[dict[str, float]]], title: str, value: object) -> None:
    assert callable(value)
    sizes = sorted({each for _, each in groups})
    print(f"\n{title}\n\n| tastes | {' | '.join(str(size) for size in sizes)} |")
    print("| --- |" + " --- |" * len(sizes))
    for num in sorted({num for num, _ in groups}):
        shown = [value(groups[(num, size)]) if (num, size) in groups else "" for size in sizes]
        print(f"| {num} | {' | '.join(shown)} |")


def _restarts(title: str, cells: list[dict[str, float]]) -> None:
    print(f"\n{title}, share of (best found - one expert) that is closed")
    for name in ("guarded", "guarded_objective"):
        closed = [cell[name] for cell in cells if name in cell]
        if closed:
            good = sum(share >= 0.99 for share in closed)
            print(
                f"{name.replace('_', ' ')}: {good} of {len(closed)} runs close 99%; the least closes {min(closed):.3f}"
            )
    for name in ("annealed_starts", "plain_starts"):
        mean = sum(cell[name] for cell in cells) / len(cells)
        print(f"{name.replace('_', ' ')} that close 99% alone: {mean:.2f}")
